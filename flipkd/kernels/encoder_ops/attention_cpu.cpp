// Attention within each text of a packed row: softmax(scale * q k^T) v, with vdpbf16ps (bf16 pairs into float32).
//
// Texts of records are short (tens of tokens), so what counts is how queries, keys and values are laid out, and that
// enough sums run side by side: eight queries against 32 keys are 16 sums, which hide the latency of each.
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
    int64_t tokens, padded;         // padded to a multiple of 16
    const uint16_t* rows;           // [tokens, columns] queries, keys and values, finished
    std::vector<uint16_t> finished; // the same, where the product's own rows are not
    std::vector<float> row;         // one token's
    std::vector<uint32_t> keys;     // [key heads, width / 2, padded]: two components of a key in one word
    std::vector<uint32_t> values;   // [key heads, padded / 2, width]: one component of two tokens in one word
    std::vector<float> scores;      // [8, padded]
    std::vector<uint16_t> weights;  // [8, padded]
    std::vector<float> outputs;     // [tokens, heads * width], where they become int8
};

inline __m512 pair_dot(__m512 sum, const uint16_t* left, __m512i right) {
    uint32_t both;
    std::memcpy(&both, left, 4);
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(both))),
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

// Lays out keys and values for pair_dot. What lies behind the last token is zero: its weight is 0, and it must be finite.
void lay_out(const Shape& shape, Text& text) {
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
        for (int64_t block = 0; block < padded; block += 16)
            for (int64_t c = 0; c < width; c += 32)
                transpose(key + block * columns + c, columns, text.tokens - block, keys + c / 2 * padded + block, padded);
        for (int64_t token = 0; token < text.tokens; token += 2)
            for (int64_t c = 0; c < width; c += 32) {
                const __m512i one = _mm512_loadu_si512(value + token * columns + c);
                const __m512i other = token + 1 < text.tokens ? _mm512_loadu_si512(value + (token + 1) * columns + c)
                                                              : _mm512_setzero_si512();
                uint32_t* place = values + token / 2 * width + c;
                _mm512_storeu_si512(place, _mm512_permutex2var_epi16(one, first_half, other));
                _mm512_storeu_si512(place + 16, _mm512_permutex2var_epi16(one, second_half, other));
            }
    }
}

// Products of `count` queries with 16 * blocks keys.
template <int count, int blocks>
inline void products(const uint16_t* queries, int64_t stride, const uint32_t* keys, int64_t half, int64_t padded,
                     float* scores) {
    __m512 sums[count][blocks];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < half; ++c) {
        __m512i key[blocks];
        for (int b = 0; b < blocks; ++b) key[b] = _mm512_loadu_si512(keys + c * padded + 16 * b);
        for (int q = 0; q < count; ++q)
            for (int b = 0; b < blocks; ++b) sums[q][b] = pair_dot(sums[q][b], queries + q * stride + 2 * c, key[b]);
    }
    for (int q = 0; q < count; ++q)
        for (int b = 0; b < blocks; ++b) _mm512_storeu_ps(scores + q * padded + 16 * b, sums[q][b]);
}

inline __mmask16 first_of(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Weights of `count` queries from `first` on over the keys that each may see, as bf16; their sums are not 1 but returned.
template <int count>
void weights_of(const uint16_t* queries, const uint32_t* keys, int64_t first, const Shape& shape, Text& text,
                float* sums) {
    const int64_t half = shape.width / 2, padded = text.padded, columns = shape.columns();
    const int64_t seen = shape.causal ? first + count : text.tokens;
    const uint16_t* own = queries + first * columns;
    float* scores = text.scores.data();
    int64_t block = 0;
    for (; block + 16 < seen; block += 32)
        products<count, 2>(own, columns, keys + block, half, padded, scores + block);
    if (block < seen) products<count, 1>(own, columns, keys + block, half, padded, scores + block);
    const __m512 scale = _mm512_set1_ps(shape.scale * LOG2_E);
    for (int q = 0; q < count; ++q) {
        const float* row = scores + q * padded;
        uint16_t* weights = text.weights.data() + q * padded;
        const int64_t visible = shape.causal ? first + q + 1 : text.tokens;
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (int64_t place = 0; place < visible; place += 16)
            most = _mm512_mask_max_ps(most, first_of(visible - place), most, _mm512_loadu_ps(row + place));
        const __m512 largest = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), scale);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t place = 0; place < seen; place += 16) {
            const __m512 power = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + place), scale, largest));
            const __m512 weight = _mm512_maskz_mov_ps(first_of(visible - place), power);
            sum = _mm512_add_ps(sum, weight);
            store_bf16(weights + place, weight);
        }
        sums[q] = _mm512_reduce_add_ps(sum);
    }
}

// Weighted means of the values, for `count` queries from `first` on.
template <int count>
void mix(const uint32_t* values, int64_t first, int64_t head, const Shape& shape, const float* sums, uint16_t* bf16,
         Text& text) {
    const int64_t padded = text.padded, width = shape.width, out_columns = shape.heads * width;
    const int64_t seen = shape.causal ? first + count : text.tokens;
    const uint16_t* weights = text.weights.data();
    for (int64_t c = 0; c < width; c += 32) {
        __m512 mixed[count][2];
        for (auto& row : mixed) row[0] = row[1] = _mm512_setzero_ps();
        for (int64_t token = 0; token < seen; token += 2) {
            const uint32_t* place = values + token / 2 * width + c;
            const __m512i both[2] = {_mm512_loadu_si512(place), _mm512_loadu_si512(place + 16)};
            for (int q = 0; q < count; ++q)
                for (int b = 0; b < 2; ++b) mixed[q][b] = pair_dot(mixed[q][b], weights + q * padded + token, both[b]);
        }
        for (int q = 0; q < count; ++q) {
            const __m512 share = _mm512_set1_ps(1.0f / sums[q]);
            const int64_t place = (first + q) * out_columns + head * width + c;
            for (int b = 0; b < 2; ++b) {
                const __m512 mean = _mm512_mul_ps(mixed[q][b], share);
                if (bf16 != nullptr)
                    store_bf16(bf16 + place + 16 * b, mean);
                else
                    _mm512_storeu_ps(text.outputs.data() + place + 16 * b, mean);
            }
        }
    }
}

template <int count>
void attend(int64_t first, int64_t head, const Shape& shape, uint16_t* bf16, Text& text) {
    const int64_t key_head = head / (shape.heads / shape.key_heads), half = shape.width / 2;
    float sums[count];
    weights_of<count>(text.rows + head * shape.width, text.keys.data() + key_head * half * text.padded, first, shape,
                      text, sums);
    mix<count>(text.values.data() + key_head * text.padded / 2 * shape.width, first, head, shape, sums, bf16, text);
}

}  // namespace
#endif

extern "C" {
#ifdef HAS_TARGET

// softmax(scale * q k^T) v within each text. product [rows, (heads + 2 key_heads) * width]: queries, keys, values.
// cosine and sine [longest text, width / 2], or null for no rotation by position. operand [rows, heads * width].
void flipkd_attend(const Product* product, const int64_t* lengths, int64_t texts, int64_t heads, int64_t key_heads,
                   int64_t width, float scale, int causal, const float* cosine, const float* sine,
                   const Operand* operand) {
    const Shape shape{heads, key_heads, width, scale, causal != 0};
    const int64_t out_columns = heads * width;
    Text text;
    int64_t first_row = 0;
    for (int64_t place = 0; place < texts; first_row += lengths[place++]) {
        const int64_t tokens = text.tokens = lengths[place];
        text.padded = (tokens + 15) / 16 * 16;
        text.scores.resize(8 * text.padded);
        text.weights.resize(8 * text.padded);
        if (product->row_scale != nullptr)
            finish<true>(*product, first_row, shape, cosine, sine, text);
        else if (cosine != nullptr)
            finish<false>(*product, first_row, shape, cosine, sine, text);
        else
            text.rows = product->values + first_row * shape.columns();
        lay_out(shape, text);
        if (operand->int8 != nullptr) text.outputs.resize(tokens * out_columns);
        uint16_t* bf16 = operand->int8 == nullptr ? operand->bf16 + first_row * out_columns : nullptr;
        for (int64_t head = 0; head < heads; ++head) {
            int64_t first = 0;
            for (; first + 8 <= tokens; first += 8) attend<8>(first, head, shape, bf16, text);
            if (tokens - first >= 4) attend<4>(first, head, shape, bf16, text), first += 4;
            if (tokens - first >= 2) attend<2>(first, head, shape, bf16, text), first += 2;
            if (tokens - first >= 1) attend<1>(first, head, shape, bf16, text);
        }
        if (operand->int8 != nullptr)
            for (int64_t token = 0; token < tokens; ++token)
                store_int8(*operand, first_row + token, out_columns, text.outputs.data() + token * out_columns);
    }
}

#else

void flipkd_attend(const Product*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float, int, const float*,
                   const float*, const Operand*) {}

#endif
}

#ifdef HAS_TARGET
#pragma GCC pop_options
#endif
