// What stands between the matrix multiplications of a transformer block: residual + norm, activation (attention is in
// attention_cpu.cpp).
//
// Each function reads what a multiplication gave and writes what the next one takes, in one pass over a row that stays
// in the cache, in float32 inside. A multiplication gives bf16, which where its operand was int8 has still to be
// multiplied by the operand's row scale; it takes bf16, or int8 with one scale per row. Texts are packed end to end:
// row t is token t.
//
// One thread: the caller runs batches side by side. Widths are multiples of 32, which the caller checks.
#include "avx512.h"

#ifdef HAS_TARGET
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")
namespace {

// Relative error 6e-5, below what the bf16 or int8 of the result shows.
inline __m512 sigmoid(__m512 x) {
    const __m512 power = power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), power));
}

// x * Phi(x), absolute error 2e-5: Phi(x) = 1/2 + x p(x^2), p a polynomial of least error in Phi for |x| <= 4.5, beyond
// which Phi is 0 or 1 within 4e-6. p is in u = x^2 / (4.5^2 / 2) - 1, from -1 to 1, where no digits cancel.
inline __m512 gelu(__m512 x) {
    const __m512 square = _mm512_min_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(20.25f));
    const __m512 u = _mm512_fmsub_ps(square, _mm512_set1_ps(2.0f / 20.25f), _mm512_set1_ps(1.0f));
    constexpr float coefficients[] = {-2.258518652e-03f, 3.119603474e-03f,  -5.417399987e-03f, 1.112059263e-02f,
                                      -1.891023304e-02f, 2.838503996e-02f,  -4.013601327e-02f, 5.469019364e-02f,
                                      -7.719215829e-02f, 1.569051165e-01f};
    __m512 p = _mm512_set1_ps(8.042688741e-04f);
    for (const float coefficient : coefficients) p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(coefficient));
    __m512 phi = _mm512_fmadd_ps(x, p, _mm512_set1_ps(0.5f));
    phi = _mm512_min_ps(_mm512_set1_ps(1.0f), _mm512_max_ps(_mm512_setzero_ps(), phi));
    return _mm512_mul_ps(x, phi);
}

// x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is the form with tanh.
inline __m512 gelu_tanh(__m512 x) {
    const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
    return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(1.59576912f))));
}

enum Activation { GELU = 0, GELU_TANH = 1, RELU = 2, SILU = 3 };

template <int kind>
inline __m512 activated(__m512 x) {
    if (kind == GELU) return gelu(x);
    if (kind == GELU_TANH) return gelu_tanh(x);
    if (kind == RELU) return _mm512_max_ps(_mm512_setzero_ps(), x);
    return _mm512_mul_ps(x, sigmoid(x));
}

template <int kind, bool scaled>
void activate(const Product& product, int64_t rows, int64_t columns, bool gated, const Operand& operand) {
    std::vector<float> buffer(columns);
    const int64_t given = gated ? 2 * columns : columns;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < columns; column += 16) {
            __m512 value = activated<kind>(load<scaled>(product, row, given, column));
            if (gated) value = _mm512_mul_ps(value, load<scaled>(product, row, given, columns + column));
            if (operand.int8 == nullptr)
                store_bf16(operand.bf16 + row * columns + column, value);
            else
                _mm512_storeu_ps(buffer.data() + column, value);
        }
        if (operand.int8 != nullptr) store_int8(operand, row, columns, buffer.data());
    }
}

template <int kind>
void activate(const Product& product, int64_t rows, int64_t columns, bool gated, const Operand& operand) {
    if (product.row_scale == nullptr) return activate<kind, false>(product, rows, columns, gated, operand);
    activate<kind, true>(product, rows, columns, gated, operand);
}

template <bool scaled>
void add_norm(const Product* product, uint16_t* state, int64_t rows, int64_t width, const float* weight,
              const float* bias, float epsilon, int is_rms, int keeps_sum, const Operand& operand) {
    std::vector<float> buffer(width);
    float* values = buffer.data();
    for (int64_t row = 0; row < rows; ++row) {
        uint16_t* own = state + row * width;
        __m512 total = _mm512_setzero_ps();
        for (int64_t column = 0; column < width; column += 16) {
            __m512 value = load_bf16(own + column);
            if (product != nullptr) value = _mm512_add_ps(value, load<scaled>(*product, row, width, column));
            if (keeps_sum) store_bf16(own + column, value);
            _mm512_storeu_ps(values + column, value);
            total = _mm512_add_ps(total, value);
        }
        const __m512 mean = _mm512_set1_ps(is_rms ? 0.0f : _mm512_reduce_add_ps(total) / static_cast<float>(width));
        __m512 squares = _mm512_setzero_ps();
        for (int64_t column = 0; column < width; column += 16) {
            const __m512 value = _mm512_sub_ps(_mm512_loadu_ps(values + column), mean);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
        const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(variance + epsilon));
        for (int64_t column = 0; column < width; column += 16) {
            __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(values + column), mean), inverse);
            const __m512 factor = _mm512_loadu_ps(weight + column);
            value = bias == nullptr ? _mm512_mul_ps(value, factor)
                                    : _mm512_fmadd_ps(value, factor, _mm512_loadu_ps(bias + column));
            if (!keeps_sum) store_bf16(own + column, value);
            if (operand.bf16 != nullptr) store_bf16(operand.bf16 + row * width + column, value);
            if (operand.int8 != nullptr) _mm512_storeu_ps(values + column, value);
        }
        if (operand.int8 != nullptr) store_int8(operand, row, width, values);
    }
}

}  // namespace
#endif

extern "C" {

// Whether the functions below may be called on this processor.
int flipkd_encoder_ops_run(void) {
#ifdef HAS_TARGET
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

#ifdef HAS_TARGET

// sum = state + product (product may be null), normed = norm(sum) * weight + bias: layer norm, or RMS norm where
// is_rms. state [rows, width] bf16 becomes sum (keeps_sum) or normed; operand gets normed, where it has a place for it.
int flipkd_add_norm(const Product* product, uint16_t* state, int64_t rows, int64_t width, const float* weight,
                    const float* bias, float epsilon, int is_rms, int keeps_sum, const Operand* operand) try {
    const bool scaled = product != nullptr && product->row_scale != nullptr;
    (scaled ? add_norm<true> : add_norm<false>)(product, state, rows, width, weight, bias, epsilon, is_rms, keeps_sum,
                                                *operand);
    return DONE;
} catch (const std::exception&) {
    return NO_MEMORY;
}

// activation(product), or activation(first half of the columns) * second half where gated. columns: of the operand.
int flipkd_activate(const Product* product, int64_t rows, int64_t columns, int kind, int gated,
                    const Operand* operand) try {
    switch (kind) {
        case GELU: activate<GELU>(*product, rows, columns, gated, *operand); break;
        case GELU_TANH: activate<GELU_TANH>(*product, rows, columns, gated, *operand); break;
        case RELU: activate<RELU>(*product, rows, columns, gated, *operand); break;
        default: activate<SILU>(*product, rows, columns, gated, *operand);
    }
    return DONE;
} catch (const std::exception&) {
    return NO_MEMORY;
}

#else

int flipkd_add_norm(const Product*, uint16_t*, int64_t, int64_t, const float*, const float*, float, int, int,
                    const Operand*) {
    return DONE;
}
int flipkd_activate(const Product*, int64_t, int64_t, int, int, const Operand*) { return DONE; }

#endif
}

#ifdef HAS_TARGET
#pragma GCC pop_options
#endif
