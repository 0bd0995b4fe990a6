// What the fused operations of a transformer block share: their arguments, and arithmetic on 16 float32 at a time.
//
// Needs AVX-512 with BF16 (Zen 4, Sapphire Rapids and later) and GCC; elsewhere PyTorch does the same work
// (reference.py).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

// The result of a multiplication, [rows, columns] in bf16. row_scale null: bias included. Else
// number = value * row_scale[row] + bias[column] (bias may be null).
struct Product {
    const uint16_t* values;
    const float* row_scale;
    const float* bias;
};

// What the next multiplication takes, [rows, columns]: int8 with row_scale if int8 is not null, else bf16.
struct Operand {
    uint16_t* bf16;
    int8_t* int8;
    float* row_scale;
};

// What the exported functions return: no exception may leave them.
enum Outcome { DONE = 0, NO_MEMORY = 1 };

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // clang has no such pragma
#define HAS_TARGET 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")

namespace {

inline __m512 from_bf16(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

inline void store_bf16(uint16_t* place, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

inline __m512 load_bf16(const uint16_t* place) {
    return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)));
}

// 16 columns of one row of a product that has row scales (scaled), or none.
template <bool scaled>
inline __m512 load(const Product& product, int64_t row, int64_t columns, int64_t column) {
    const __m512 value = load_bf16(product.values + row * columns + column);
    if (!scaled) return value;
    const __m512 scale = _mm512_set1_ps(product.row_scale[row]);
    if (product.bias == nullptr) return _mm512_mul_ps(value, scale);
    return _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(product.bias + column));
}

// Writes one finished row in int8. Its scale follows from the row alone, so a text does not depend on its neighbours.
inline void store_int8(const Operand& operand, int64_t row, int64_t columns, const float* values) {
    __m512 largest = _mm512_setzero_ps();
    __mmask16 not_a_number = 0;
    for (int64_t column = 0; column < columns; column += 16) {
        const __m512 value = _mm512_loadu_ps(values + column);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
        not_a_number |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    }
    const float most = _mm512_reduce_max_ps(largest);
    // A row of zeros stays zero; what is not finite goes on through the scale, so that the caller sees it.
    operand.row_scale[row] = not_a_number ? NAN : most / 127.0f;
    const __m512 stretch = _mm512_set1_ps(most > 0.0f ? 127.0f / most : 0.0f);
    for (int64_t column = 0; column < columns; column += 16) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + column), stretch));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(operand.int8 + row * columns + column),
                         _mm512_cvtsepi32_epi8(rounded));
    }
}

// 2^x, relative error 8e-8, for x from -126 to 126 (beyond, that of the bound: no denormal number, which would be slow).
// 2^n * 2^f with f in [-1/2, 1/2] by a polynomial of least relative error.
inline __m512 power_of_two(__m512 x) {
    // The operand that may be NaN comes second: min and max give the second one then.
    x = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_max_ps(_mm512_set1_ps(-126.0f), x));
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 power = _mm512_set1_ps(1.326697515e-3f);
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(9.675464576e-3f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(5.550742646e-2f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(2.402212166e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(6.931469491e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, whole);
}

constexpr float LOG2_E = 1.44269504f;

}  // namespace
#pragma GCC pop_options
#endif
