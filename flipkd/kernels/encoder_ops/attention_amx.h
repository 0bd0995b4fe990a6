// Attention's two multiplications on AMX: 16 queries against 16 keys (or components) in one instruction.
//
// Tiles are 16 rows of 64 bytes. They are configured once a call and released at its end: oneDNN, which runs on the same
// threads, looks at the configuration before each use of its own.
#pragma once
#include "attention_layout.h"

#if defined(HAS_TARGET) && defined(__linux__) && __GNUC__ >= 11
#define HAS_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2,amx-tile,amx-bf16")
namespace {

// Whether the processor has AMX with bf16, and Linux lets this process use it.
inline bool amx_allowed() {
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// GCC does not know what ldtilecfg and tileloadd read: what was written must be in memory before.
inline void finish_writing(const void* what) { asm volatile("" : : "r"(what) : "memory"); }

inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    finish_writing(&config);
    _tile_loadconfig(&config);
}

inline void release_tiles() { _tile_release(); }

// One head's results for the `count` (at most 16) queries from `first` on.
inline void attend_with_amx(int count, int64_t first, int64_t head, const Shape& shape, uint16_t* bf16, Text& text) {
    const int64_t width = shape.width, padded = text.padded, key_head = head / (shape.heads / shape.key_heads);
    const int64_t seen = shape.causal ? first + count : text.tokens;
    const uint16_t* queries = text.rows + first * shape.columns() + head * width;
    int64_t stride = shape.columns();
    if (count < 16) {  // a tile reads 16 rows
        text.last_queries.resize(16 * width);
        for (int q = 0; q < count; ++q)
            std::memcpy(text.last_queries.data() + q * width, queries + q * stride, width * sizeof(uint16_t));
        queries = text.last_queries.data();
        stride = width;
    }
    const uint32_t* keys = text.keys.data() + key_head * width / 2 * padded;
    finish_writing(queries);
    for (int64_t block = 0; block < seen; block += 32) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t c = 0; c < width; c += 32) {
            _tile_loadd(2, queries + c, stride * 2);
            _tile_loadd(3, keys + c / 2 * padded + block, padded * 4);
            _tile_loadd(4, keys + c / 2 * padded + block + 16, padded * 4);
            _tile_dpbf16ps(0, 2, 3);
            _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, text.scores.data() + block, padded * 4);
        _tile_stored(1, text.scores.data() + block + 16, padded * 4);
    }
    float sums[16];
    weigh(count, shape.causal ? first + 1 : text.tokens, (seen + 31) / 32 * 32, shape, text, sums);
    const uint32_t* values = text.values.data() + key_head * padded / 2 * width;
    alignas(64) float mixed[2][16][16];
    finish_writing(text.weights.data());
    for (int64_t c = 0; c < width; c += 32) {
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t token = 0; token < seen; token += 32) {
            _tile_loadd(2, text.weights.data() + token, padded * 2);
            _tile_loadd(3, values + token / 2 * width + c, width * 4);
            _tile_loadd(4, values + token / 2 * width + c + 16, width * 4);
            _tile_dpbf16ps(0, 2, 3);
            _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, mixed[0], 64);
        _tile_stored(1, mixed[1], 64);
        for (int q = 0; q < count; ++q)
            for (int b = 0; b < 2; ++b)
                put((first + q) * shape.heads * width + head * width + c + 16 * b,
                    _mm512_mul_ps(_mm512_load_ps(mixed[b][q]), _mm512_set1_ps(1.0f / sums[q])), bf16, text);
    }
}

}  // namespace
#pragma GCC pop_options
#endif
