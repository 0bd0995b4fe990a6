// Attention within each text of a packed row: softmax(scale * q k^T) v, with vdpbf16ps (bf16 pairs into float32).
//
// Texts of records are short (tens of tokens), so what counts is how queries, keys and values are laid out, and that
// enough sums run side by side: eight queries against 32 keys are 16 sums, which hide the latency of each.
#include <algorithm>

#include "attention_amx.h"

#ifdef HAS_TARGET
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")
namespace {

inline __m512 pair_dot(__m512 sum, const uint16_t* left, __m512i right) {
    uint32_t both;
    std::memcpy(&both, left, 4);
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(both))),
                            reinterpret_cast<__m512bh>(right));
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

template <int count>
void attend(int64_t first, int64_t head, const Shape& shape, uint16_t* bf16, Text& text) {
    const int64_t width = shape.width, padded = text.padded, columns = shape.columns();
    const int64_t key_head = head / (shape.heads / shape.key_heads), seen = shape.causal ? first + count : text.tokens;
    const uint16_t* queries = text.rows + first * columns + head * width;
    const uint32_t* keys = text.keys.data() + key_head * width / 2 * padded;
    int64_t block = 0;
    for (; block + 16 < seen; block += 32)
        products<count, 2>(queries, columns, keys + block, width / 2, padded, text.scores.data() + block);
    if (block < seen)
        products<count, 1>(queries, columns, keys + block, width / 2, padded, text.scores.data() + block);
    float sums[count];
    weigh(count, shape.causal ? first + 1 : text.tokens, (seen + 15) / 16 * 16, shape, text, sums);
    const uint32_t* values = text.values.data() + key_head * padded / 2 * width;
    for (int64_t c = 0; c < width; c += 32) {
        __m512 mixed[count][2];
        for (auto& row : mixed) row[0] = row[1] = _mm512_setzero_ps();
        for (int64_t token = 0; token < seen; token += 2) {
            const uint32_t* place = values + token / 2 * width + c;
            const __m512i both[2] = {_mm512_loadu_si512(place), _mm512_loadu_si512(place + 16)};
            for (int q = 0; q < count; ++q)
                for (int b = 0; b < 2; ++b)
                    mixed[q][b] = pair_dot(mixed[q][b], text.weights.data() + q * padded + token, both[b]);
        }
        for (int q = 0; q < count; ++q)
            for (int b = 0; b < 2; ++b)
                put((first + q) * shape.heads * width + head * width + c + 16 * b,
                    _mm512_mul_ps(mixed[q][b], _mm512_set1_ps(1.0f / sums[q])), bf16, text);
    }
}

}  // namespace
#endif

extern "C" {

// Whether flipkd_attend may be told to use AMX.
int flipkd_attention_has_amx(void) {
#ifdef HAS_AMX
    static const bool allowed = amx_allowed();
    return allowed;
#else
    return 0;
#endif
}

#ifdef HAS_TARGET

// softmax(scale * q k^T) v within each text. product [rows, (heads + 2 key_heads) * width]: queries, keys, values.
// cosine and sine [longest text, width / 2], or null for no rotation by position. operand [rows, heads * width].
int flipkd_attend(const Product* product, const int64_t* lengths, int64_t texts, int64_t heads, int64_t key_heads,
                  int64_t width, float scale, int causal, const float* cosine, const float* sine,
                  const Operand* operand, int with_amx) try {
#ifdef HAS_AMX
    if (with_amx) configure_tiles();
#endif
    const Shape shape{heads, key_heads, width, scale, causal != 0};
    const int64_t out_columns = heads * width;
    Text text;
    int64_t first_row = 0;
    for (int64_t place = 0; place < texts; first_row += lengths[place++]) {
        const int64_t tokens = text.tokens = lengths[place];
        text.padded = (tokens + 31) / 32 * 32;
        text.scores.resize(16 * text.padded);
        text.weights.resize(16 * text.padded);
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
#ifdef HAS_AMX
            // A text that fills less than half a tile takes longer there than with vdpbf16ps.
            for (; with_amx && tokens > 8 && first < tokens; first += 16)
                attend_with_amx(static_cast<int>(std::min<int64_t>(16, tokens - first)), first, head, shape, bf16, text);
#endif
            for (; first + 8 <= tokens; first += 8) attend<8>(first, head, shape, bf16, text);
            if (tokens - first >= 4) attend<4>(first, head, shape, bf16, text), first += 4;
            if (tokens - first >= 2) attend<2>(first, head, shape, bf16, text), first += 2;
            if (tokens - first >= 1) attend<1>(first, head, shape, bf16, text);
        }
        if (operand->int8 != nullptr)
            for (int64_t token = 0; token < tokens; ++token)
                store_int8(*operand, first_row + token, out_columns, text.outputs.data() + token * out_columns);
    }
#ifdef HAS_AMX
    if (with_amx) release_tiles();
#endif
    return DONE;
} catch (const std::exception&) {
#ifdef HAS_AMX
    if (with_amx) release_tiles();
#endif
    return NO_MEMORY;
}

#else

int flipkd_attend(const Product*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float, int, const float*,
                  const float*, const Operand*, int) {
    return DONE;
}

#endif
}

#ifdef HAS_TARGET
#pragma GCC pop_options
#endif
