/* Attention over packed sequences.
 *
 * `vdpbf16ps` multiplies pairs of bfloat16 and adds both products to a float32: what is summed over must lie in pairs,
 * so keys and values of a sequence's head are laid out anew once for all its queries.
 */
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include "kernels.h"

typedef uint32_t pair; /* of bfloat16 */

enum { MOST_QUERIES = 8, MOST_VECTORS = 2, LEAST_TOKENS = 256 };

/* 16 rows of 16 pairs become 16 columns. */
KERNEL void transpose(__m512i x[LANES]) {
    __m512i y[LANES];
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
        x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
        x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
        x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
    }
}

/* Keys (length rows of `size`) as (size / 2, padded) pairs: a pair of a key's numbers beside those of other keys. */
KERNEL void lay_out_keys(const bf16 *keys, int64_t row, int64_t length, int64_t padded, int64_t size, pair *to) {
    for (int64_t j = 0; j < length; j += LANES)
        for (int64_t d = 0; d < size; d += 2 * LANES) {
            __m512i x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = j + i < length ? _mm512_loadu_si512(keys + (j + i) * row + d) : _mm512_setzero_si512();
            transpose(x);
            for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + (d / 2 + i) * padded + j, x[i]);
        }
}

/* Values (length rows of `size`) as (half the length, size) pairs: a token's number beside the next token's. */
KERNEL void lay_out_values(const bf16 *values, int64_t row, int64_t length, int64_t size, pair *to) {
    for (int64_t j = 0; j < length; j += 2, to += size, values += 2 * row)
        for (int64_t d = 0; d < size; d += LANES) {
            __m512i one = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values + d)));
            __m512 next = j + 1 < length ? load(values + row + d) : _mm512_setzero_ps();
            _mm512_storeu_si512(to + d, _mm512_or_si512(one, _mm512_castps_si512(next)));
        }
}

/* sums[r][v] = Σ over pairs of x[r] · y, for R rows of x and V vectors of y's columns. */
KERNEL void multiply(const int R, const int V, const bf16 *x, int64_t row, const pair *y, int64_t columns,
                     int64_t pairs, __m512 sums[MOST_QUERIES][MOST_VECTORS]) {
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh there[MOST_VECTORS];
        for (int v = 0; v < V; v++) there[v] = (__m512bh)_mm512_loadu_si512(y + p * columns + v * LANES);
        for (int r = 0; r < R; r++) {
            int32_t both;
            memcpy(&both, x + r * row + 2 * p, sizeof both);
            __m512bh here = (__m512bh)_mm512_set1_epi32(both);
            for (int v = 0; v < V; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], here, there[v]);
        }
    }
}

KERNEL void score(const int R, const int V, const bf16 *q, int64_t row, const pair *keys, int64_t padded, int64_t size,
                  float *scores) {
    __m512 sums[MOST_QUERIES][MOST_VECTORS];
    multiply(R, V, q, row, keys, padded, size / 2, sums);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) _mm512_storeu_ps(scores + r * padded + v * LANES, sums[r][v]);
}

/* One query's e^(score - the largest), and one over their sum. Padding becomes 0. */
KERNEL float exponentials(const float *scores, int64_t length, float scale, bf16 *weights) {
    __m512 largest = constant(-__builtin_inff()), sum = _mm512_setzero_ps(), factor = constant(scale);
    for (int64_t j = 0; j < length; j += LANES)
        largest = _mm512_mask_max_ps(largest, first_lanes(length - j), largest, _mm512_loadu_ps(scores + j));
    __m512 shift = _mm512_mul_ps(constant(_mm512_reduce_max_ps(largest)), factor);
    for (int64_t j = 0; j < length; j += LANES) {
        __m512 x = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), factor, shift));
        x = _mm512_maskz_mov_ps(first_lanes(length - j), x);
        sum = _mm512_add_ps(sum, x);
        store(weights + j, x);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

typedef struct {
    int64_t length, padded, size, row, width;
    float scale;
    pair *keys, *values;
    float *scores; /* (MOST_QUERIES, padded) */
    bf16 *weights; /* (MOST_QUERIES, padded) */
} Head;

/* R queries of one head of one sequence. */
KERNEL void attend(const int R, const Head *h, const bf16 *q, bf16 *out) {
    float over_sum[MOST_QUERIES];
    int64_t j = 0;
    for (; j + 2 * LANES <= h->padded; j += 2 * LANES)
        score(R, 2, q, h->row, h->keys + j, h->padded, h->size, h->scores + j);
    if (j < h->padded) score(R, 1, q, h->row, h->keys + j, h->padded, h->size, h->scores + j);
    for (int r = 0; r < R; r++)
        over_sum[r] = exponentials(h->scores + r * h->padded, h->length, h->scale, h->weights + r * h->padded);
    for (int64_t d = 0; d < h->size; d += 2 * LANES) {
        __m512 sums[MOST_QUERIES][MOST_VECTORS];
        multiply(R, 2, h->weights, h->padded, h->values + d, h->size, (h->length + 1) / 2, sums);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++)
                store(out + r * h->width + d + v * LANES, _mm512_mul_ps(sums[r][v], constant(over_sum[r])));
    }
}

/* Ask for one head's rows of a sequence: they lie 3 · width apart, too far for the CPU to guess. */
KERNEL void ask_for(const bf16 *q, int64_t length, int64_t size, int64_t width) {
    for (int64_t i = 0; i < 3 * length; i++)
        for (int64_t d = 0; d < size; d += 2 * LANES) _mm_prefetch((const char *)(q + i * width + d), _MM_HINT_T1);
}

static int64_t rounded_up(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

/* Bytes that a thread of `deebert_attention` works in: keys and values, 8 queries' scores and weights. */
int64_t deebert_attention_scratch(int64_t longest, int64_t size) {
    return rounded_up(longest) * (4 * size + MOST_QUERIES * 6);
}

typedef struct {
    const bf16 *qkv;
    const int64_t *offsets;
    int64_t sequences, heads, size, scratch_bytes;
    float scale;
    char *scratch;
    bf16 *out;
} Attention;

/* Of `i`, which counts the heads of each sequence, then those of the next. */
FOR_THIS_CPU static void attend_heads(const void *task, int64_t first, int64_t last, int64_t thread) {
    const Attention *a = task;
    int64_t size = a->size, width = a->heads * size, row = 3 * width;
    for (int64_t item = first; item < last; item++) {
        int64_t n = item / a->heads, head = item % a->heads;
        int64_t start = a->offsets[n], length = a->offsets[n + 1] - start, padded = rounded_up(length);
        Head h = {.length = length, .padded = padded, .size = size, .row = row, .width = width, .scale = a->scale};
        h.keys = (pair *)(a->scratch + thread * a->scratch_bytes);
        h.values = h.keys + padded * size / 2;
        h.scores = (float *)(h.values + padded * size / 2);
        h.weights = (bf16 *)(h.scores + MOST_QUERIES * padded);
        const bf16 *q = a->qkv + start * row + head * size;
        bf16 *o = a->out + start * width + head * size;
        if (n + 1 < a->sequences) ask_for(q + length * row, a->offsets[n + 2] - a->offsets[n + 1], size, width);
        lay_out_keys(q + width, row, length, padded, size, h.keys);
        lay_out_values(q + 2 * width, row, length, size, h.values);
        int64_t i = 0;
        for (; i + MOST_QUERIES <= length; i += MOST_QUERIES) attend(MOST_QUERIES, &h, q + i * row, o + i * width);
        q += i * row, o += i * width;
        switch (length - i) {
            case 1: attend(1, &h, q, o); break;
            case 2: attend(2, &h, q, o); break;
            case 3: attend(3, &h, q, o); break;
            case 4: attend(4, &h, q, o); break;
            case 5: attend(5, &h, q, o); break;
            case 6: attend(6, &h, q, o); break;
            case 7: attend(7, &h, q, o); break;
        }
    }
}

/* Scaled dot-product self-attention inside each sequence.
 *
 * qkv: (tokens, 3, heads, size); size is a multiple of 32.
 * offsets: (sequences + 1): sequence i is rows offsets[i] to offsets[i + 1].
 * scale: log2(e) / sqrt(size).
 * scratch: for each thread as many bytes as `deebert_attention_scratch` says for the longest.
 * out: (tokens, heads, size).
 */
void deebert_attention(const bf16 *qkv, const int64_t *offsets, int64_t sequences, int64_t heads, int64_t size,
                       float scale, char *scratch, int64_t scratch_bytes, bf16 *out, Fork fork, int64_t threads) {
    Attention a = {qkv, offsets, sequences, heads, size, scratch_bytes, scale, scratch, out};
    int64_t tokens = offsets[sequences], least = tokens ? LEAST_TOKENS * sequences / tokens : 1;
    share((Team){fork, threads}, sequences * heads, least ? least : 1, attend_heads, &a);
}

#endif
