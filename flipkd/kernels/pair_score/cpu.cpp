// pair_score on the CPU: gather two rows by index, multiply, calibrate, keep the survivors of a threshold.
//
// Reading guide: one Rows type per storage type and instruction set says how two rows become one score; `score_block` is
// the one loop over pairs, compiled once per Rows type; `score_range` is one thread's share; the exported functions are
// at the end. Random gathers wait for memory, not for arithmetic, so what matters is that every row is asked for long
// before it is needed (prefetch), that a row is read once, and that nothing else (scales, norms) is gathered beside it.
//
// One score depends on its two rows and the instruction set only: neither on the thread count, nor on where a block or a
// thread's share begins, nor on whether the pair before had the same left row.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../threads.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FLIPKD_X86 1
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms from GCC's own AVX-512 header
#endif
#include <immintrin.h>
// A function's own target attribute instead of -march: the library runs on every x86-64 and picks at run time.
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))
#else
#define FLIPKD_X86 0
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

namespace {

enum Level { PORTABLE = 0, LEVEL_AVX2 = 1, LEVEL_AVX512 = 2, LEVEL_AVX512_BF16 = 3 };
enum Dtype { FLOAT32 = 0, BF16 = 1, INT8 = 2 };

constexpr int64_t BLOCK_PAIRS = 1024;  // indices and scores of a block stay in L1 between its passes
constexpr int64_t LINE_BYTES = 64;

// Rows are asked for ahead of use, a burst of pairs at a time, into L2: L1 has too few miss buffers to keep memory busy.
// Requests side by side overlap their page-table walks, so bursts are long, except where rows are short and the tables'
// page tables stay in the cache: there a burst of eight lines is best.
// Measured on Zen 4, int8, dim 128, 1 M rows, M pairs/s per thread, random | grouped by left row:
//   into L1, burst of 2: 21 | 38        into L2, burst of 2: 40 | 57        into L2, burst of 32: 33 | 58
// both threads, medians of 7 runs in turn:
//   burst of 8 lines, 16 ahead: 104 | 138      24 ahead: 105 | 156      bursts of 16 lines, 32 ahead: 59 | 129
// and 32 M rows in pages of 4 KiB:      into L2, burst of 2: 10 | 12        into L2, burst of 32: 11 | 18
constexpr int64_t SHORT_BURST_BYTES = 8 * LINE_BYTES, SHORT_AHEAD_PAIRS = 24;
constexpr int64_t LONG_BURST_PAIRS = 32, LONG_AHEAD_PAIRS = 64;
constexpr int64_t AHEAD_BYTES = 1 << 18;  // a quarter of L2: rows that wait for their turn must not push each other out
constexpr int64_t LARGE_TABLE_BYTES = 1 << 30;

constexpr int64_t MIN_PAIRS_PER_THREAD = 16384;  // below this a thread costs more than it saves

// Mirrored field by field by `_Job` in flipkd/kernels/pair_score/__init__.py.
struct Job {
    const void *left, *right, *left_index, *right_index;
    float* score;          // [pairs]; the first `survivors` hold the result
    float* probability;    // [pairs] or null: no calibration
    int64_t* position;     // [pairs] or null: no threshold
    int64_t left_rows, right_rows, dim, pairs;
    int64_t bad_place;     // out: first pair with an index outside its table, or -1
    int64_t survivors;     // out
    float slope, offset;   // probability = sigmoid(slope * score + offset)
    float min_score;
    int32_t dtype, index_bytes, level, threads;
};

// ---- how two rows become one score ----------------------------------------------------------------------------------
// Each type has Element, Left (what is worth keeping while the left row stays the same), prepare() and sums().

// What is added up over two rows. int8 rows carry a direction only: score = dot / (|left| |right|); float rows are of
// unit length, and leave `squares` alone. The int8 sums are exact and what follows them is correctly rounded, so all
// instruction sets give the same bits, and a row against itself gives exactly 1.
struct Sums {
    float dot;
    float squares;  // |left|^2 |right|^2
};

INLINE Sums int8_sums(int32_t dot, int32_t left_square, int32_t right_square) {
    return {static_cast<float>(dot), static_cast<float>(left_square) * static_cast<float>(right_square)};
}

INLINE float widen(float value) { return value; }
INLINE float widen(uint16_t bf16_bits) {
    const uint32_t bits = static_cast<uint32_t>(bf16_bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Adds left.right to `dot` and right.right to `square`.
INLINE void add_portable(const int8_t* left, const int8_t* right, int64_t dim, int32_t& dot, int32_t& square) {
    for (int64_t k = 0; k < dim; ++k) {
        dot += left[k] * right[k];
        square += right[k] * right[k];
    }
}

struct PortableInt8 {
    using Element = int8_t;
    using Left = int32_t;  // |left|^2
    static Left prepare(const Element* left, int64_t dim) {
        int32_t dot = 0, square = 0;
        add_portable(left, left, dim, dot, square);
        return square;
    }
    static Sums sums(const Element* left, Left left_square, const Element* right, int64_t dim) {
        int32_t dot = 0, square = 0;
        add_portable(left, right, dim, dot, square);
        return int8_sums(dot, left_square, square);
    }
};

struct Nothing {};
template <class E>
struct FloatRows {  // keeps nothing of the left row: it stays in L1
    using Element = E;
    using Left = Nothing;
    INLINE static Left prepare(const E*, int64_t) { return {}; }
};

template <class E>
struct PortableFloat : FloatRows<E> {
    static Sums sums(const E* left, Nothing, const E* right, int64_t dim) {
        float lanes[16] = {};  // sixteen sums instead of one: the compiler can use vectors, and the error is smaller
        const int64_t whole = dim / 16 * 16;
        for (int64_t k = 0; k < whole; k += 16)
            for (int lane = 0; lane < 16; ++lane) lanes[lane] += widen(left[k + lane]) * widen(right[k + lane]);
        for (int64_t k = whole; k < dim; ++k) lanes[k - whole] += widen(left[k]) * widen(right[k]);
        for (int half = 8; half > 0; half /= 2)
            for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
        return {lanes[0], 1.0f};
    }
};

#if FLIPKD_X86

AVX2 inline int32_t sum_avx2(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

AVX2 inline float sum_avx2(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

struct Avx2Int8 {
    using Element = int8_t;
    using Left = int32_t;  // |left|^2
    // int8 is widened to int16: the 8-bit multiply of AVX2 saturates.
    AVX2 static inline __m256i load(const Element* row) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
    }
    AVX2 static inline void add(const Element* left, const Element* right, int64_t dim, int32_t& dot, int32_t& square) {
        __m256i dots = _mm256_setzero_si256(), squares = dots;
        int64_t k = 0;
        for (; k + 16 <= dim; k += 16) {
            const __m256i r = load(right + k);
            dots = _mm256_add_epi32(dots, _mm256_madd_epi16(load(left + k), r));
            squares = _mm256_add_epi32(squares, _mm256_madd_epi16(r, r));
        }
        dot = sum_avx2(dots);
        square = sum_avx2(squares);
        add_portable(left + k, right + k, dim - k, dot, square);
    }
    AVX2 static inline Left prepare(const Element* left, int64_t dim) {
        int32_t dot, square;
        add(left, left, dim, dot, square);
        return square;
    }
    AVX2 static inline Sums sums(const Element* left, Left left_square, const Element* right, int64_t dim) {
        int32_t dot, square;
        add(left, right, dim, dot, square);
        return int8_sums(dot, left_square, square);
    }
};

AVX2 inline __m256 load_avx2(const float* row) { return _mm256_loadu_ps(row); }
AVX2 inline __m256 load_avx2(const uint16_t* row) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

template <class E>
struct Avx2Float : FloatRows<E> {
    AVX2 static inline Sums sums(const E* left, Nothing, const E* right, int64_t dim) {
        __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();  // two chains hide the latency of the multiply-add
        int64_t k = 0;
        for (; k + 16 <= dim; k += 16) {
            even = _mm256_fmadd_ps(load_avx2(left + k), load_avx2(right + k), even);
            odd = _mm256_fmadd_ps(load_avx2(left + k + 8), load_avx2(right + k + 8), odd);
        }
        float sum = sum_avx2(_mm256_add_ps(even, odd));
        for (; k < dim; ++k) sum += widen(left[k]) * widen(right[k]);
        return {sum, 1.0f};
    }
};

INLINE uint64_t first(int64_t count) { return ~uint64_t{0} >> (64 - count); }  // a mask of `count` ones, 1..64

// Sums of `a` and of `b` in the first two numbers: one tree for both needs half the shuffles.
AVX512 inline __m128i sum_two(__m512i a, __m512i b) {
    const __m256i a4 = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    const __m256i b4 = _mm256_add_epi32(_mm512_castsi512_si256(b), _mm512_extracti64x4_epi64(b, 1));
    const __m256i pairs = _mm256_hadd_epi32(a4, b4);
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    return _mm_hadd_epi32(sums, sums);
}

struct Avx512Int8 {
    using Element = int8_t;
    struct Left {
        int32_t square;  // |left|^2
        int32_t excess;  // 128 * sum(left)
    };
    // The multiply takes unsigned by signed. Flipping the top bit of the right row adds 128 to each of its numbers, which
    // adds 128 * sum(left) to the dot product: a constant of the left row. Norms use |x| for both, which changes no square.
    AVX512 static inline Left prepare(const Element* left, int64_t dim) {
        __m512i square = _mm512_setzero_si512(), total = square;
        const auto add = [&](__m512i l) AVX512 {
            const __m512i magnitude = _mm512_abs_epi8(l);
            square = _mm512_dpbusd_epi32(square, magnitude, magnitude);
            total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), l);
        };
        int64_t k = 0;
        for (; k + 64 <= dim; k += 64) add(_mm512_loadu_si512(left + k));
        if (k < dim) add(_mm512_maskz_loadu_epi8(first(dim - k), left + k));
        const __m128i both = sum_two(square, total);
        return {_mm_cvtsi128_si32(both), 128 * _mm_extract_epi32(both, 1)};
    }
    AVX512 static inline Sums sums(const Element* left, Left kept, const Element* right, int64_t dim) {
        __m512i dot = _mm512_setzero_si512(), square = dot;
        const auto add = [&](__m512i l, __m512i r) AVX512 {
            const __m512i magnitude = _mm512_abs_epi8(r);
            dot = _mm512_dpbusd_epi32(dot, _mm512_xor_si512(r, _mm512_set1_epi8(-128)), l);
            square = _mm512_dpbusd_epi32(square, magnitude, magnitude);
        };
        int64_t k = 0;
        for (; k + 64 <= dim; k += 64) add(_mm512_loadu_si512(left + k), _mm512_loadu_si512(right + k));
        if (k < dim) {  // a masked load reads nothing past the row, and its zeros add nothing
            const uint64_t mask = first(dim - k);
            add(_mm512_maskz_loadu_epi8(mask, left + k), _mm512_maskz_loadu_epi8(mask, right + k));
        }
        const __m128i both = sum_two(dot, square);
        return int8_sums(_mm_cvtsi128_si32(both) - kept.excess, kept.square, _mm_extract_epi32(both, 1));
    }
};

struct Avx512F32 : FloatRows<float> {
    AVX512 static inline Sums sums(const Element* left, Nothing, const Element* right, int64_t dim) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        int64_t k = 0;
        for (; k + 32 <= dim; k += 32) {
            even = _mm512_fmadd_ps(_mm512_loadu_ps(left + k), _mm512_loadu_ps(right + k), even);
            odd = _mm512_fmadd_ps(_mm512_loadu_ps(left + k + 16), _mm512_loadu_ps(right + k + 16), odd);
        }
        for (; k < dim; k += 16) {
            const auto mask = static_cast<__mmask16>(first(std::min<int64_t>(16, dim - k)));
            even = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, left + k), _mm512_maskz_loadu_ps(mask, right + k), even);
        }
        return {_mm512_reduce_add_ps(_mm512_add_ps(even, odd)), 1.0f};
    }
};

struct Avx512Bf16 : FloatRows<uint16_t> {  // multiplies bf16 as it is: half the instructions of widening
    AVX512_BF16 static inline __m512bh load(const Element* row) { return (__m512bh)_mm512_loadu_si512(row); }
    AVX512_BF16 static inline Sums sums(const Element* left, Nothing, const Element* right, int64_t dim) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        int64_t k = 0;
        for (; k + 64 <= dim; k += 64) {
            even = _mm512_dpbf16_ps(even, load(left + k), load(right + k));
            odd = _mm512_dpbf16_ps(odd, load(left + k + 32), load(right + k + 32));
        }
        for (; k < dim; k += 32) {
            const __mmask32 mask = static_cast<__mmask32>(first(std::min<int64_t>(32, dim - k)));
            even = _mm512_dpbf16_ps(even, (__m512bh)_mm512_maskz_loadu_epi16(mask, left + k),
                                    (__m512bh)_mm512_maskz_loadu_epi16(mask, right + k));
        }
        return {_mm512_reduce_add_ps(_mm512_add_ps(even, odd)), 1.0f};
    }
};

#endif  // FLIPKD_X86

// ---- the loop over pairs --------------------------------------------------------------------------------------------

INLINE void prefetch_row(const void* row, int64_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(row), end = begin + static_cast<uintptr_t>(bytes);
    for (uintptr_t line = begin & ~(LINE_BYTES - 1); line < end; line += LINE_BYTES)
        __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
}

struct Prefetch {
    int64_t ahead_pairs, burst_pairs;
};

INLINE Prefetch choose_prefetch(const Job& job, int64_t row_bytes, int64_t pair_bytes) {
    const bool large = std::max(job.left_rows, job.right_rows) > LARGE_TABLE_BYTES / row_bytes;
    const int64_t fit = std::max<int64_t>(1, AHEAD_BYTES / pair_bytes), few = SHORT_BURST_BYTES / pair_bytes;
    if (!large && few >= 2) return {SHORT_AHEAD_PAIRS, std::min(few, SHORT_AHEAD_PAIRS)};
    return {std::min(fit, LONG_AHEAD_PAIRS), std::min(fit, LONG_BURST_PAIRS)};
}

// Scores pairs [begin, end). Indices up to `known` (>= end) have been checked, so rows up to there may be asked for.
// FIXED_DIM is 0, or the dim where the compiler should know it: it then unrolls the row loops (1.2 times as fast at 128).
template <class Rows, class Index, int64_t FIXED_DIM>
INLINE void score_block(const Job& job, int64_t begin, int64_t end, int64_t known, float* out) {
    using Element = typename Rows::Element;
    const auto* left_rows = static_cast<const Element*>(job.left);
    const auto* right_rows = static_cast<const Element*>(job.right);
    const auto* left_index = static_cast<const Index*>(job.left_index);
    const auto* right_index = static_cast<const Index*>(job.right_index);
    const int64_t dim = FIXED_DIM ? FIXED_DIM : job.dim, row_bytes = dim * static_cast<int64_t>(sizeof(Element));
    const bool grouped = end - begin > 1 && left_index[begin] == left_index[begin + 1];  // a guess; only speed hangs on it
    const auto [ahead, burst] = choose_prefetch(job, row_bytes, grouped ? row_bytes : 2 * row_bytes);
    int64_t kept_row = -1, asked_row = -1;
    typename Rows::Left kept{};
    float squares[BLOCK_PAIRS];
    for (int64_t from = begin; from < end; from += burst) {
        const int64_t to = std::min(from + burst, end), ask_to = std::min(to + ahead, known);
        for (int64_t p = from + ahead; p < ask_to; ++p) {
            const int64_t l = left_index[p], r = right_index[p];
            if (l != asked_row && l >= 0) prefetch_row(left_rows + l * dim, row_bytes);
            if (r >= 0) prefetch_row(right_rows + r * dim, row_bytes);
            asked_row = l;
        }
        for (int64_t p = from; p < to; ++p) {
            const int64_t l = left_index[p], r = right_index[p];
            if (l < 0 || r < 0) {
                out[p - begin] = std::numeric_limits<float>::quiet_NaN();
                squares[p - begin] = 1.0f;
                continue;
            }
            const Element* left = left_rows + l * dim;
            if (l != kept_row) {  // pairs grouped by their left row do this once a group
                kept = Rows::prepare(left, dim);
                kept_row = l;
            }
            const Sums sums = Rows::sums(left, kept, right_rows + r * dim, dim);
            out[p - begin] = sums.dot;
            squares[p - begin] = sums.squares;
        }
    }
    for (int64_t i = 0; i < end - begin; ++i) {  // apart from the gathers, so that it runs sixteen scores at a time
        const float length = std::sqrt(std::max(squares[i], 1.0f));  // integer sums: below 1 is a row of zeros, dot is 0
        const float score = std::is_same<Element, int8_t>::value ? out[i] / length : out[i];
        out[i] = score > 1.0f ? 1.0f : score < -1.0f ? -1.0f : score;  // NaN stays
    }
}

using BlockFunction = void (*)(const Job&, int64_t, int64_t, int64_t, float*);

// The loop is inlined into a function that has the instruction set's target attribute, and so are the Rows functions.
#define BLOCK_FUNCTION(NAME, TARGET, ROWS)                                                                         \
    template <class Index>                                                                                         \
    TARGET void NAME(const Job& job, int64_t begin, int64_t end, int64_t known, float* out) {                      \
        if (job.dim == 128) return score_block<ROWS, Index, 128>(job, begin, end, known, out);                     \
        if (job.dim == 256) return score_block<ROWS, Index, 256>(job, begin, end, known, out);                     \
        score_block<ROWS, Index, 0>(job, begin, end, known, out);                                                  \
    }

BLOCK_FUNCTION(portable_f32, , PortableFloat<float>)
BLOCK_FUNCTION(portable_bf16, , PortableFloat<uint16_t>)
BLOCK_FUNCTION(portable_int8, , PortableInt8)
#if FLIPKD_X86
BLOCK_FUNCTION(avx2_f32, AVX2, Avx2Float<float>)
BLOCK_FUNCTION(avx2_bf16, AVX2, Avx2Float<uint16_t>)
BLOCK_FUNCTION(avx2_int8, AVX2, Avx2Int8)
BLOCK_FUNCTION(avx512_f32, AVX512, Avx512F32)
BLOCK_FUNCTION(avx512_int8, AVX512, Avx512Int8)
BLOCK_FUNCTION(avx512_bf16, AVX512_BF16, Avx512Bf16)
#endif

int best_level() {
#if FLIPKD_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return __builtin_cpu_supports("avx512bf16") ? LEVEL_AVX512_BF16 : LEVEL_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return LEVEL_AVX2;
#endif
    return PORTABLE;
}

BlockFunction choose(const Job& job) {
#define EITHER(NAME) (job.index_bytes == 4 ? NAME<int32_t> : NAME<int64_t>)
#define BY_DTYPE(F32, B16, I8) (job.dtype == FLOAT32 ? EITHER(F32) : job.dtype == BF16 ? EITHER(B16) : EITHER(I8))
    switch (std::min(job.level, best_level())) {
#if FLIPKD_X86
        case LEVEL_AVX512_BF16: return BY_DTYPE(avx512_f32, avx512_bf16, avx512_int8);
        case LEVEL_AVX512: return BY_DTYPE(avx512_f32, avx2_bf16, avx512_int8);  // has no bf16 of its own
        case LEVEL_AVX2: return BY_DTYPE(avx2_f32, avx2_bf16, avx2_int8);
#endif
        default: return BY_DTYPE(portable_f32, portable_bf16, portable_int8);
    }
#undef BY_DTYPE
#undef EITHER
}

// ---- one thread's share ---------------------------------------------------------------------------------------------

// Returns the first pair in [begin, end) with an index outside -1..rows-1, or -1.
template <class Index>
int64_t find_bad(const Job& job, int64_t begin, int64_t end) {
    const auto* left = static_cast<const Index*>(job.left_index);
    const auto* right = static_cast<const Index*>(job.right_index);
    const auto bad = [](Index index, int64_t rows) {  // one compare: -1 wraps to 0, everything below it to huge
        return static_cast<uint64_t>(static_cast<int64_t>(index)) + 1 > static_cast<uint64_t>(rows);
    };
    bool any = false;  // no early exit: the compiler can use vectors
    for (int64_t p = begin; p < end; ++p) any |= bad(left[p], job.left_rows) | bad(right[p], job.right_rows);
    if (any)
        for (int64_t p = begin; p < end; ++p)
            if (bad(left[p], job.left_rows) || bad(right[p], job.right_rows)) return p;
    return -1;
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Scores [begin, end) and packs what survives from job.score[begin] on. Returns the first bad place or -1.
int64_t score_range(const Job& job, BlockFunction score, int64_t begin, int64_t end, int64_t* survivors) {
    const auto check = job.index_bytes == 4 ? find_bad<int32_t> : find_bad<int64_t>;
    float block[BLOCK_PAIRS];
    int64_t kept = begin, rated = begin;
    int64_t known = begin;  // indices are checked past the block's end, so that prefetching runs on over it
    *survivors = 0;
    for (int64_t from = begin; from < end; from += BLOCK_PAIRS) {
        const int64_t to = std::min(from + BLOCK_PAIRS, end), next = std::min(to + LONG_AHEAD_PAIRS, end);
        const int64_t bad = check(job, known, next);
        if (bad >= 0) return bad;
        known = next;
        float* out = job.position ? block : job.score + from;
        score(job, from, to, known, out);
        for (int64_t p = from; job.position && p < to; ++p) {
            if (!(block[p - from] >= job.min_score)) continue;  // NaN does not survive
            job.score[kept] = block[p - from];
            job.position[kept++] = p;
        }
        if (!job.position) kept = to;
        for (; job.probability && rated < kept; ++rated)
            job.probability[rated] = sigmoid(job.slope * job.score[rated] + job.offset);
    }
    *survivors = kept - begin;
    return -1;
}

template <class T>
void move_down(T* values, int64_t to, int64_t from, int64_t count) {
    if (values && to != from) std::memmove(values + to, values + from, static_cast<size_t>(count) * sizeof(T));
}

// Share s is the pairs [result[s], result[s + 1]).
std::vector<int64_t> split(int64_t pairs, int64_t threads) {
    const int64_t shares = std::max<int64_t>(1, std::min(threads, pairs / MIN_PAIRS_PER_THREAD));
    std::vector<int64_t> starts(shares + 1);
    for (int64_t s = 0; s <= shares; ++s) starts[s] = pairs / shares * s + std::min(s, pairs % shares);
    return starts;
}

}  // namespace

EXPORT int32_t flipkd_abi_version() { return 5; }

EXPORT int32_t flipkd_pair_score_level() { return best_level(); }

// Fills job->score (and probability, position) and sets job->survivors and job->bad_place. With a bad place nothing else
// is to be used.
EXPORT void flipkd_pair_score(Job* job) {
    const BlockFunction score = choose(*job);
    const std::vector<int64_t> starts = split(job->pairs, job->threads);
    const int64_t shares = static_cast<int64_t>(starts.size()) - 1;
    std::vector<int64_t> survivors(shares), bad(shares, -1);
    in_threads(shares, [&](int64_t s) { bad[s] = score_range(*job, score, starts[s], starts[s + 1], &survivors[s]); });
    job->bad_place = -1;
    job->survivors = 0;
    for (int64_t s = 0; s < shares; ++s) {
        if (bad[s] >= 0) {
            job->bad_place = bad[s];  // shares are in order, and each found its first
            return;
        }
        move_down(job->score, job->survivors, starts[s], survivors[s]);
        move_down(job->probability, job->survivors, starts[s], survivors[s]);
        move_down(job->position, job->survivors, starts[s], survivors[s]);
        job->survivors += survivors[s];
    }
}

// Reads the rows of pairs [begin, end), whole lines, prefetched as in score_block; returns the XOR of their words.
INLINE static uint64_t read_rows(const char* rows, int64_t row_bytes, const int32_t* left, const int32_t* right,
                                 int64_t begin, int64_t end, int64_t ahead, int64_t burst) {
    uint64_t words[8] = {};
    for (int64_t from = begin; from < end; from += burst) {
        const int64_t to = std::min(from + burst, end), ask_to = std::min(to + ahead, end);
        for (int64_t p = from + ahead; p < ask_to; ++p) {
            prefetch_row(rows + left[p] * row_bytes, row_bytes);
            prefetch_row(rows + right[p] * row_bytes, row_bytes);
        }
        for (int64_t p = from; p < to; ++p)
            for (const char* row : {rows + left[p] * row_bytes, rows + right[p] * row_bytes})
                for (int64_t k = 0; k + LINE_BYTES <= row_bytes; k += LINE_BYTES)
                    for (int w = 0; w < 8; ++w) {  // one vector of eight sums, or four of two
                        uint64_t word;
                        std::memcpy(&word, row + k + 8 * w, sizeof word);
                        words[w] ^= word;
                    }
    }
    for (int w = 1; w < 8; ++w) words[0] ^= words[w];
    return words[0];
}

// For benchmarks only: what the machine gives this loop is its limit for random gathers. Indices are not checked.
EXPORT uint64_t flipkd_gather_read(const char* rows, int64_t row_bytes, const int32_t* left, const int32_t* right,
                                   int64_t pairs, int64_t threads, int64_t ahead, int64_t burst) {
    const std::vector<int64_t> starts = split(pairs, threads);
    std::atomic<uint64_t> total{0};
    in_threads(static_cast<int64_t>(starts.size()) - 1, [&](int64_t s) {
        total ^= row_bytes == 128 ? read_rows(rows, 128, left, right, starts[s], starts[s + 1], ahead, burst)
                                  : read_rows(rows, row_bytes, left, right, starts[s], starts[s + 1], ahead, burst);
    });
    return total;
}
