// Attention within each text: how a text's queries, keys and values are laid out, and the softmax. What multiplies them
// is vdpbf16ps (attention_cpu.cpp) or AMX (attention_amx.h); both take the same layout.
#pragma once
#include "avx512.h"

#ifdef HAS_TARGET
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")
namespace {

struct Shape {
    int64_t heads, key_heads, width;
    float scale;
    bool causal;

    int64_t columns() const { return (heads + 2 * key_heads) * width; }
};

// Workspace of one text.
struct Text {
    int64_t tokens, padded;         // padded to a multiple of 32
    const uint16_t* rows;           // [tokens, columns] queries, keys and values, finished
    std::vector<uint16_t> finished; // the same, where the product's own rows are not
    std::vector<float> row;         // one token's
    std::vector<uint32_t> keys;     // [key heads, width / 2, padded]: two components of a key in one word
    std::vector<uint32_t> values;   // [key heads, padded / 2, width]: one component of two tokens in one word
    std::vector<float> scores;      // [16, padded]
    std::vector<uint16_t> weights;  // [16, padded]
    std::vector<uint16_t> last_queries;  // of a block of fewer than 16, for AMX
    std::vector<float> outputs;     // [tokens, heads * width], where they become int8
};

// Turns each pair (component c, component c + width / 2) by the angle of the token's position.
inline void rotate(float* head, int64_t width, const float* cosine, const float* sine) {
    const int64_t half = width / 2;
    for (int64_t c = 0; c < half; c += 16) {
        const __m512 first = _mm512_loadu_ps(head + c), second = _mm512_loadu_ps(head + half + c);
        const __m512 cosines = _mm512_loadu_ps(cosine + c), sines = _mm512_loadu_ps(sine + c);
        _mm512_storeu_ps(head + c, _mm512_fmsub_ps(first, cosines, _mm512_mul_ps(second, sines)));
        _mm512_storeu_ps(head + half + c, _mm512_fmadd_ps(second, cosines, _mm512_mul_ps(first, sines)));
    }
}

// Scales the rows of a text and turns them by position.
template <bool scaled>
void finish(const Product& product, int64_t first_row, const Shape& shape, const float* cosine, const float* sine,
            Text& text) {
    const int64_t columns = shape.columns(), half = shape.width / 2;
    text.finished.resize(text.tokens * columns);
    text.row.resize(columns);
    float* row = text.row.data();
    for (int64_t token = 0; token < text.tokens; ++token) {
        for (int64_t column = 0; column < columns; column += 16)
            _mm512_storeu_ps(row + column, load<scaled>(product, first_row + token, columns, column));
        if (cosine != nullptr)
            for (int64_t head = 0; head < shape.heads + shape.key_heads; ++head)
                rotate(row + head * shape.width, shape.width, cosine + token * half, sine + token * half);
        for (int64_t column = 0; column < columns; column += 16)
            store_bf16(text.finished.data() + token * columns + column, _mm512_loadu_ps(row + column));
    }
    text.rows = text.finished.data();
}

// Transposes 16 rows of 16 words; rows from `count` on are zero.
inline void transpose(const uint16_t* rows, int64_t stride, int64_t count, uint32_t* out, int64_t out_stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = i < count ? _mm512_loadu_si512(rows + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 g + j] holds, in its 128-bit lane l, word 4 l + j of rows 4 g to 4 g + 3.
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88),
                      high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_storeu_si512(out + j * out_stride, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(out + (4 + j) * out_stride, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(out + (8 + j) * out_stride, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(out + (12 + j) * out_stride, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

// Lays out keys and values. Values behind the last token are zero: their weight is 0, and they must be finite.
inline void lay_out(const Shape& shape, Text& text) {
    const int64_t columns = shape.columns(), width = shape.width, padded = text.padded;
    text.keys.resize(shape.key_heads * width / 2 * padded);
    text.values.resize(shape.key_heads * padded / 2 * width);
    alignas(64) uint16_t places[64];
    for (int i = 0; i < 32; ++i) {
        places[2 * i] = static_cast<uint16_t>(i);
        places[2 * i + 1] = static_cast<uint16_t>(32 + i);
    }
    const __m512i first_half = _mm512_load_si512(places), second_half = _mm512_load_si512(places + 32);
    for (int64_t head = 0; head < shape.key_heads; ++head) {
        const uint16_t* key = text.rows + (shape.heads + head) * width;
        const uint16_t* value = text.rows + (shape.heads + shape.key_heads + head) * width;
        uint32_t* keys = text.keys.data() + head * width / 2 * padded;
        uint32_t* values = text.values.data() + head * padded / 2 * width;
        for (int64_t block = 0; block < text.tokens; block += 16)
            for (int64_t c = 0; c < width; c += 32)
                transpose(key + block * columns + c, columns, text.tokens - block, keys + c / 2 * padded + block, padded);
        for (int64_t token = 0; token < padded; token += 2)
            for (int64_t c = 0; c < width; c += 32) {
                __m512i one = _mm512_setzero_si512(), other = one;
                if (token < text.tokens) one = _mm512_loadu_si512(value + token * columns + c);
                if (token + 1 < text.tokens) other = _mm512_loadu_si512(value + (token + 1) * columns + c);
                uint32_t* place = values + token / 2 * width + c;
                _mm512_storeu_si512(place, _mm512_permutex2var_epi16(one, first_half, other));
                _mm512_storeu_si512(place + 16, _mm512_permutex2var_epi16(one, second_half, other));
            }
    }
}

inline __mmask16 first_of(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Scores of `count` queries, of which the first sees `visible` keys (and where causal, each one more than the one before),
// to their weights as bf16, up to key `end` (a multiple of 16). The weights' sums are not 1 but returned.
inline void weigh(int count, int64_t visible, int64_t end, const Shape& shape, Text& text, float* sums) {
    const __m512 scale = _mm512_set1_ps(shape.scale * LOG2_E);
    for (int q = 0; q < count; ++q, visible += shape.causal) {
        const float* row = text.scores.data() + q * text.padded;
        uint16_t* weights = text.weights.data() + q * text.padded;
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (int64_t place = 0; place < visible; place += 16)
            most = _mm512_mask_max_ps(most, first_of(visible - place), most, _mm512_loadu_ps(row + place));
        const __m512 largest = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), scale);
        __m512 sum = _mm512_setzero_ps();
        int64_t place = 0;
        for (; place < visible; place += 16) {
            const __m512 power = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + place), scale, largest));
            const __m512 weight = _mm512_maskz_mov_ps(first_of(visible - place), power);
            sum = _mm512_add_ps(sum, weight);
            store_bf16(weights + place, weight);
        }
        for (; place < end; place += 16) store_bf16(weights + place, _mm512_setzero_ps());
        sums[q] = _mm512_reduce_add_ps(sum);
    }
}

// Writes 16 components of one token's result: into the operand where it is bf16, else for store_int8.
inline void put(int64_t place, __m512 mean, uint16_t* bf16, Text& text) {
    if (bf16 != nullptr)
        store_bf16(bf16 + place, mean);
    else
        _mm512_storeu_ps(text.outputs.data() + place, mean);
}

}  // namespace
#pragma GCC pop_options
#endif
