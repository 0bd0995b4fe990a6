// Shares of one piece of work, side by side.
#pragma once
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace {

// Calls work(share) for every share from 0 on, each but the first in a thread of its own. `work` throws nothing.
template <class Work>
void in_threads(int64_t shares, const Work& work) {
    std::vector<std::thread> threads;
    int64_t started = 1;
    try {
        threads.reserve(shares);
        for (; started < shares; ++started) threads.emplace_back(work, started);
    } catch (const std::exception&) {  // no more threads to be had: this one does their shares
    }
    work(0);
    for (int64_t s = started; s < shares; ++s) work(s);
    for (auto& thread : threads) thread.join();
}

}  // namespace
