// What stands between the matrix multiplications of a transformer block: attention, residual + norm, activation.
//
// Each function reads what a multiplication gave and writes what the next one takes, in one pass over a row that stays
// in the cache, in float32 inside. A multiplication gives bf16, or int32 together with the scales that turn it into
// numbers; it takes bf16, or int8 with one scale per row. Texts are packed end to end: row t is token t.
//
// One thread: the caller runs batches side by side. Needs AVX-512 with BF16 (Zen 4, Sapphire Rapids and later); elsewhere
// PyTorch does the same work (reference.py). Widths are multiples of 32, which the caller checks.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_TARGET 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")
#endif

extern "C" {

// The result of a multiplication, [rows, columns]. row_scale null: values are bf16, bias included. Else values are
// int32 and number = value * row_scale[row] * column_scale[column] + bias[column] (bias may be null).
struct Product {
    const void* values;
    const float* row_scale;
    const float* column_scale;
    const float* bias;
};

// What the next multiplication takes, [rows, columns]: int8 with row_scale if int8 is not null, else bf16.
struct Operand {
    uint16_t* bf16;
    int8_t* int8;
    float* row_scale;
};
}

#ifdef HAS_TARGET
namespace {

inline __m512 from_bf16(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

inline void store_bf16(uint16_t* place, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

inline __m512 load_bf16(const uint16_t* place) {
    return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)));
}

// 16 columns of one row of a product.
inline __m512 load(const Product& product, int64_t row, int64_t columns, int64_t column) {
    if (product.row_scale == nullptr)
        return load_bf16(static_cast<const uint16_t*>(product.values) + row * columns + column);
    const int32_t* place = static_cast<const int32_t*>(product.values) + row * columns + column;
    const __m512 number = _mm512_cvtepi32_ps(_mm512_loadu_si512(place));
    const __m512 scale =
        _mm512_mul_ps(_mm512_set1_ps(product.row_scale[row]), _mm512_loadu_ps(product.column_scale + column));
    if (product.bias == nullptr) return _mm512_mul_ps(number, scale);
    return _mm512_fmadd_ps(number, scale, _mm512_loadu_ps(product.bias + column));
}

// Writes one finished row. Its scale follows from the row alone, so a text does not depend on its neighbours.
void store_row(const Operand& operand, int64_t row, int64_t columns, const float* values) {
    if (operand.int8 == nullptr) {
        for (int64_t column = 0; column < columns; column += 16)
            store_bf16(operand.bf16 + row * columns + column, _mm512_loadu_ps(values + column));
        return;
    }
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

// e^x, relative error 2e-7: 2^n * 2^f with f in [-1/2, 1/2] by a polynomial (coefficients ln(2)^k / k!).
inline __m512 exponential(__m512 x) {
    // The operand that may be NaN comes second: min and max give the second one then.
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
    const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(scaled, whole);
    __m512 power = _mm512_set1_ps(1.5403530e-4f);
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.33335581e-3f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(9.61812911e-3f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(5.55041087e-2f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(2.40226507e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(6.93147181e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, whole);
}

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// x * Phi(x), with erf by formula 7.1.26 of Abramowitz and Stegun (absolute error 1.5e-7).
inline __m512 gelu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
    __m512 series = _mm512_set1_ps(1.061405429f);
    series = _mm512_fmadd_ps(series, t, _mm512_set1_ps(-1.453152027f));
    series = _mm512_fmadd_ps(series, t, _mm512_set1_ps(1.421413741f));
    series = _mm512_fmadd_ps(series, t, _mm512_set1_ps(-0.284496736f));
    series = _mm512_fmadd_ps(series, t, _mm512_set1_ps(0.254829592f));
    series = _mm512_mul_ps(series, t);
    const __m512 tail = _mm512_mul_ps(series, exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z))));
    // tail = 1 - erf(z): Phi(x) is tail / 2 below zero and 1 - tail / 2 above.
    const __m512 half = _mm512_mul_ps(tail, _mm512_set1_ps(0.5f));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(half, static_cast<__mmask16>(~negative), one, half));
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

template <int kind>
void activate(const Product& product, int64_t rows, int64_t columns, bool gated, const Operand& operand) {
    std::vector<float> buffer(columns);
    const int64_t given = gated ? 2 * columns : columns;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < columns; column += 16) {
            __m512 value = activated<kind>(load(product, row, given, column));
            if (gated) value = _mm512_mul_ps(value, load(product, row, given, columns + column));
            _mm512_storeu_ps(buffer.data() + column, value);
        }
        store_row(operand, row, columns, buffer.data());
    }
}

// Workspace of attention for one text.
struct Text {
    int64_t tokens, padded;           // padded to a multiple of 16
    std::vector<uint16_t> queries;    // [heads, tokens, width]
    std::vector<uint32_t> keys;       // [key heads, width / 2, padded]: two components of a key in one word
    std::vector<uint32_t> values;     // [key heads, padded / 2, width]: one component of two tokens in one word
    std::vector<float> scores;        // [4, padded]
    std::vector<float> outputs;       // [tokens, heads * width]
    std::vector<float> row;           // one token's queries, keys and values
};

inline __m512 pair_dot(__m512 sum, uint32_t left, __m512i right) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(left))),
                            reinterpret_cast<__m512bh>(right));
}

// Turns each pair (component c, component c + width / 2) by the angle of the token's position.
void rotate(float* head, int64_t width, const float* cosine, const float* sine) {
    const int64_t half = width / 2;
    for (int64_t c = 0; c < half; c += 16) {
        const __m512 first = _mm512_loadu_ps(head + c), second = _mm512_loadu_ps(head + half + c);
        const __m512 cosines = _mm512_loadu_ps(cosine + c), sines = _mm512_loadu_ps(sine + c);
        _mm512_storeu_ps(head + c, _mm512_fmsub_ps(first, cosines, _mm512_mul_ps(second, sines)));
        _mm512_storeu_ps(head + half + c, _mm512_fmadd_ps(second, cosines, _mm512_mul_ps(first, sines)));
    }
}

// Reads queries, keys and values of a text, turns them by position, and lays them out for pair_dot.
void lay_out(const Product& product, int64_t first_row, int64_t heads, int64_t key_heads, int64_t width,
             const float* cosine, const float* sine, Text& text) {
    const int64_t columns = (heads + 2 * key_heads) * width, half = width / 2;
    uint16_t* value_halves = reinterpret_cast<uint16_t*>(text.values.data());
    alignas(64) uint16_t key_row[1024];
    for (int64_t token = 0; token < text.tokens; ++token) {
        float* row = text.row.data();
        for (int64_t column = 0; column < columns; column += 16)
            _mm512_storeu_ps(row + column, load(product, first_row + token, columns, column));
        if (cosine != nullptr)
            for (int64_t head = 0; head < heads + key_heads; ++head)
                rotate(row + head * width, width, cosine + token * half, sine + token * half);
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t c = 0; c < width; c += 16)
                store_bf16(text.queries.data() + (head * text.tokens + token) * width + c,
                           _mm512_loadu_ps(row + head * width + c));
        for (int64_t head = 0; head < key_heads; ++head) {
            const float* key = row + (heads + head) * width;
            const float* value = row + (heads + key_heads + head) * width;
            for (int64_t c = 0; c < width; c += 16) store_bf16(key_row + c, _mm512_loadu_ps(key + c));
            uint32_t* keys = text.keys.data() + head * half * text.padded + token;
            for (int64_t c = 0; c < half; ++c) {
                uint32_t both;
                std::memcpy(&both, key_row + 2 * c, 4);
                keys[c * text.padded] = both;
            }
            for (int64_t c = 0; c < width; c += 16) store_bf16(key_row + c, _mm512_loadu_ps(value + c));
            uint16_t* values = value_halves + (head * text.padded + (token & ~int64_t{1})) * width + (token & 1);
            for (int64_t c = 0; c < width; ++c) values[2 * c] = key_row[c];
        }
    }
}

// Scores of `count` (at most 4) queries against all keys that they may see, then softmax in place, as bf16 pairs.
template <int count>
void weights_of(const uint16_t* queries, const uint32_t* keys, int64_t first, int64_t width, float scale, bool causal,
                Text& text) {
    const int64_t half = width / 2, padded = text.padded;
    const int64_t seen = causal ? first + count : text.tokens;
    for (int64_t block = 0; block < seen; block += 16) {
        __m512 sums[count];
        for (int q = 0; q < count; ++q) sums[q] = _mm512_setzero_ps();
        for (int64_t c = 0; c < half; ++c) {
            const __m512i key = _mm512_loadu_si512(keys + c * padded + block);
            for (int q = 0; q < count; ++q) {
                uint32_t query;
                std::memcpy(&query, queries + q * width + 2 * c, 4);
                sums[q] = pair_dot(sums[q], query, key);
            }
        }
        for (int q = 0; q < count; ++q)
            _mm512_storeu_ps(text.scores.data() + q * padded + block, _mm512_mul_ps(sums[q], _mm512_set1_ps(scale)));
    }
    for (int q = 0; q < count; ++q) {
        float* row = text.scores.data() + q * padded;
        const int64_t visible = causal ? first + q + 1 : text.tokens;
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (int64_t block = 0; block < visible; block += 16) {
            const int64_t left = visible - block;
            const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
            most = _mm512_mask_max_ps(most, mask, most, _mm512_loadu_ps(row + block));
        }
        const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        __m512 sum = _mm512_setzero_ps();
        for (int64_t block = 0; block < padded; block += 16) {
            const int64_t left = visible - block;
            const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
            __m512 power = _mm512_setzero_ps();
            if (mask) power = _mm512_maskz_mov_ps(mask, exponential(_mm512_sub_ps(_mm512_loadu_ps(row + block), largest)));
            sum = _mm512_add_ps(sum, power);
            _mm512_storeu_ps(row + block, power);
        }
        const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
        // In place: 16 float32 become 16 bf16, which always lie before what is still to be read.
        uint16_t* short_row = reinterpret_cast<uint16_t*>(row);
        for (int64_t block = 0; block < padded; block += 16)
            store_bf16(short_row + block, _mm512_mul_ps(_mm512_loadu_ps(row + block), share));
    }
}

template <int count>
void mix(const uint32_t* values, int64_t first, int64_t head, int64_t heads, int64_t width, bool causal, Text& text) {
    const int64_t padded = text.padded;
    const int64_t seen = causal ? first + count : text.tokens;
    for (int64_t c = 0; c < width; c += 16) {
        __m512 sums[count];
        for (int q = 0; q < count; ++q) sums[q] = _mm512_setzero_ps();
        for (int64_t token = 0; token < seen; token += 2) {
            const __m512i both = _mm512_loadu_si512(values + token / 2 * width + c);
            for (int q = 0; q < count; ++q) {
                uint32_t weights;
                std::memcpy(&weights, reinterpret_cast<const uint16_t*>(text.scores.data() + q * padded) + token, 4);
                sums[q] = pair_dot(sums[q], weights, both);
            }
        }
        for (int q = 0; q < count; ++q)
            _mm512_storeu_ps(text.outputs.data() + (first + q) * heads * width + head * width + c, sums[q]);
    }
}

template <int count>
void attend(const uint16_t* queries, const uint32_t* keys, const uint32_t* values, int64_t first,
            int64_t head, int64_t heads, int64_t width, float scale, bool causal, Text& text) {
    weights_of<count>(queries + first * width, keys, first, width, scale, causal, text);
    mix<count>(values, first, head, heads, width, causal, text);
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
void flipkd_add_norm(const Product* product, uint16_t* state, int64_t rows, int64_t width, const float* weight,
                     const float* bias, float epsilon, int is_rms, int keeps_sum, const Operand* operand) {
    std::vector<float> buffer(width);
    float* values = buffer.data();
    for (int64_t row = 0; row < rows; ++row) {
        uint16_t* own = state + row * width;
        __m512 total = _mm512_setzero_ps();
        for (int64_t column = 0; column < width; column += 16) {
            __m512 value = load_bf16(own + column);
            if (product != nullptr) value = _mm512_add_ps(value, load(*product, row, width, column));
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
            _mm512_storeu_ps(values + column, value);
        }
        if (operand->bf16 != nullptr || operand->int8 != nullptr) store_row(*operand, row, width, values);
    }
}

// activation(product), or activation(first half of the columns) * second half where gated. columns: of the operand.
void flipkd_activate(const Product* product, int64_t rows, int64_t columns, int kind, int gated,
                     const Operand* operand) {
    switch (kind) {
        case GELU: return activate<GELU>(*product, rows, columns, gated, *operand);
        case GELU_TANH: return activate<GELU_TANH>(*product, rows, columns, gated, *operand);
        case RELU: return activate<RELU>(*product, rows, columns, gated, *operand);
        default: return activate<SILU>(*product, rows, columns, gated, *operand);
    }
}

// softmax(scale * q k^T) v within each text. product [rows, (heads + 2 key_heads) * width]: queries, keys, values.
// cosine and sine [longest text, width / 2], or null for no rotation by position. operand [rows, heads * width].
void flipkd_attend(const Product* product, const int64_t* lengths, int64_t texts, int64_t heads, int64_t key_heads,
                   int64_t width, float scale, int causal, const float* cosine, const float* sine,
                   const Operand* operand) {
    Text text;
    text.row.resize((heads + 2 * key_heads) * width);
    int64_t first_row = 0;
    for (int64_t place = 0; place < texts; ++place) {
        const int64_t tokens = lengths[place];
        text.tokens = tokens;
        text.padded = (tokens + 15) / 16 * 16;
        text.queries.resize(heads * tokens * width);
        // What lies behind the last token must be finite (its weight is 0): a fresh zero each time.
        text.keys.assign(key_heads * width / 2 * text.padded, 0);
        text.values.assign(key_heads * text.padded / 2 * width, 0);
        text.scores.resize(4 * text.padded);
        text.outputs.resize(tokens * heads * width);
        lay_out(*product, first_row, heads, key_heads, width, cosine, sine, text);
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t key_head = head / (heads / key_heads);
            const uint16_t* queries = text.queries.data() + head * tokens * width;
            const uint32_t* keys = text.keys.data() + key_head * width / 2 * text.padded;
            const uint32_t* values = text.values.data() + key_head * text.padded / 2 * width;
            for (int64_t first = 0; first < tokens; first += 4) {
                switch (tokens - first) {
                    case 1: attend<1>(queries, keys, values, first, head, heads, width, scale, causal, text); break;
                    case 2: attend<2>(queries, keys, values, first, head, heads, width, scale, causal, text); break;
                    case 3: attend<3>(queries, keys, values, first, head, heads, width, scale, causal, text); break;
                    default: attend<4>(queries, keys, values, first, head, heads, width, scale, causal, text);
                }
            }
        }
        for (int64_t token = 0; token < tokens; ++token)
            store_row(*operand, first_row + token, heads * width, text.outputs.data() + token * heads * width);
        first_row += tokens;
    }
}

#else

void flipkd_add_norm(const Product*, uint16_t*, int64_t, int64_t, const float*, const float*, float, int, int,
                     const Operand*) {}
void flipkd_activate(const Product*, int64_t, int64_t, int, int, const Operand*) {}
void flipkd_attend(const Product*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float, int, const float*,
                   const float*, const Operand*) {}

#endif
}

#ifdef HAS_TARGET
#pragma GCC pop_options
#endif
