/* What a model does between its products, in bfloat16: attention over packed sequences, GELU, the sum of two blocks
 * normalized, a sequence's mean, an off-ramp's answer, and to bytes and back where the products are of bytes. One
 * thread; for CPUs with AVX-512 and bfloat16 (Intel since Cooper Lake, AMD since Zen 4), which is asked at run time
 * (`deebert_runs_here`): the rest of the program is built for any. Sums and exponentials are float32, and each result
 * is rounded once. Knows nothing of tensors: sizes and addresses are checked by whoever calls.
 *
 * A bfloat16 is the upper half of a float32. `vdpbf16ps` multiplies pairs of them and adds both products to a float32:
 * what is summed over must lie in pairs, so keys and values of a sequence are laid out anew once for all its queries.
 */
#include <stdint.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#include <string.h>

#define FOR_THIS_CPU __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
/* Where R and V are constants, loops over them leave no loop and arrays become registers. */
#define KERNEL static inline __attribute__((always_inline)) FOR_THIS_CPU

typedef uint16_t bf16;
typedef uint32_t pair; /* of bfloat16 */

enum { LANES = 16, MOST_QUERIES = 8, MOST_VECTORS = 2 };

int deebert_runs_here(void) {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

KERNEL __m512 constant(float x) { return _mm512_set1_ps(x); }

KERNEL __m512 load(const bf16 *x) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

KERNEL void store(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

/* The first `count` lanes; all, where there are more. */
KERNEL __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1);
}

/* 2^x for x <= 0: 2^f by its Taylor series (|f| <= 1/2, relative error below 3e-6), times 2^n. */
KERNEL __m512 exp2_of(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);
    __m512 y = constant(1.3333558e-3f);
    y = _mm512_fmadd_ps(y, f, constant(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, f, constant(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, f, constant(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, f, constant(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, f, constant(1.0f));
    return _mm512_scalef_ps(y, n);
}

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

/* Bytes that `deebert_attention` works in: keys and values, 8 queries' scores and weights. */
int64_t deebert_attention_scratch(int64_t longest, int64_t size) {
    return rounded_up(longest) * (4 * size + MOST_QUERIES * 6);
}

/* Scaled dot-product self-attention inside each sequence.
 *
 * qkv: (tokens, 3, heads, size); size is a multiple of 32.
 * offsets: (sequences + 1): sequence i is rows offsets[i] to offsets[i + 1].
 * scale: log2(e) / sqrt(size).
 * scratch: as many bytes as `deebert_attention_scratch` says for the longest.
 * out: (tokens, heads, size).
 */
FOR_THIS_CPU void deebert_attention(const bf16 *qkv, const int64_t *offsets, int64_t sequences, int64_t heads,
                                    int64_t size, float scale, void *scratch, bf16 *out) {
    int64_t width = heads * size, row = 3 * width;
    for (int64_t n = 0; n < sequences; n++) {
        int64_t start = offsets[n], length = offsets[n + 1] - start, padded = rounded_up(length);
        Head h = {.length = length, .padded = padded, .size = size, .row = row, .width = width, .scale = scale};
        h.keys = scratch;
        h.values = h.keys + padded * size / 2;
        h.scores = (float *)(h.values + padded * size / 2);
        h.weights = (bf16 *)(h.scores + MOST_QUERIES * padded);
        for (int64_t head = 0; head < heads; head++) {
            const bf16 *q = qkv + start * row + head * size;
            bf16 *o = out + start * width + head * size;
            if (n + 1 < sequences) ask_for(q + length * row, offsets[n + 2] - offsets[n + 1], size, width);
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
}

/* x Φ(x), of the normal distribution: its tail beyond |x| by Abramowitz and Stegun 7.1.26 (off by 8e-8 at most). */
KERNEL __m512 gelu_of(__m512 x) {
    __m512 size = _mm512_abs_ps(x);
    __m512 t = _mm512_div_ps(constant(1.0f), _mm512_fmadd_ps(size, constant(0.3275911f * 0.70710678f), constant(1.0f)));
    __m512 tail = constant(0.5f * 1.061405429f);
    tail = _mm512_fmadd_ps(tail, t, constant(0.5f * -1.453152027f));
    tail = _mm512_fmadd_ps(tail, t, constant(0.5f * 1.421413741f));
    tail = _mm512_fmadd_ps(tail, t, constant(0.5f * -0.284496736f));
    tail = _mm512_fmadd_ps(tail, t, constant(0.5f * 0.254829592f));
    __m512 log2_density = _mm512_mul_ps(_mm512_mul_ps(x, x), constant(-0.72134752f)); /* log2(e) / 2 */
    log2_density = _mm512_max_ps(constant(-200.0f), log2_density); /* of a NaN and a number, what stands second */
    tail = _mm512_mul_ps(_mm512_mul_ps(tail, t), exp2_of(log2_density));
    /* What x > 0 keeps is x less the tail's share, what x < 0 keeps is that share. */
    return _mm512_fnmadd_ps(size, tail, _mm512_max_ps(_mm512_setzero_ps(), x));
}

/* In place. */
FOR_THIS_CPU void deebert_gelu(bf16 *x, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, gelu_of(load(x + i)));
    if (i < count) {
        bf16 rest[LANES] = {0};
        memcpy(rest, x + i, (count - i) * sizeof *x);
        store(rest, gelu_of(load(rest)));
        memcpy(x + i, rest, (count - i) * sizeof *x);
    }
}

/* Each row of x + residual, normalized; in place of x. width is a multiple of 16. */
FOR_THIS_CPU void deebert_add_norm(bf16 *x, const bf16 *residual, int64_t rows, int64_t width, const bf16 *weight,
                                   const bf16 *bias, float eps) {
    for (int64_t r = 0; r < rows; r++, x += width, residual += width) {
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += LANES)
            sum = _mm512_add_ps(sum, _mm512_add_ps(load(x + i), load(residual + i)));
        __m512 mean = constant(_mm512_reduce_add_ps(sum) / width);
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 y = _mm512_sub_ps(_mm512_add_ps(load(x + i), load(residual + i)), mean);
            squares = _mm512_fmadd_ps(y, y, squares);
        }
        __m512 variance = constant(_mm512_reduce_add_ps(squares) / width + eps);
        __m512 over_deviation = _mm512_div_ps(constant(1.0f), _mm512_sqrt_ps(variance));
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 y = _mm512_sub_ps(_mm512_add_ps(load(x + i), load(residual + i)), mean);
            store(x + i, _mm512_fmadd_ps(_mm512_mul_ps(y, over_deviation), load(weight + i), load(bias + i)));
        }
    }
}

/* The mean of each sequence's rows: (tokens, width) -> (sequences, width); width is a multiple of 16. */
FOR_THIS_CPU void deebert_mean(const bf16 *states, const int64_t *offsets, int64_t sequences, int64_t width,
                               bf16 *out) {
    for (int64_t n = 0; n < sequences; n++, out += width) {
        __m512 share = constant(1.0f / (offsets[n + 1] - offsets[n]));
        for (int64_t i = 0; i < width; i += 4 * LANES) {
            int64_t vectors = width - i < 4 * LANES ? (width - i) / LANES : 4;
            __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int64_t t = offsets[n]; t < offsets[n + 1]; t++)
                for (int64_t v = 0; v < vectors; v++)
                    sums[v] = _mm512_add_ps(sums[v], load(states + t * width + i + v * LANES));
            for (int64_t v = 0; v < vectors; v++) store(out + i + v * LANES, _mm512_mul_ps(sums[v], share));
        }
    }
}

/* tanh, to 2e-6: of what is no number, none. */
KERNEL __m512 tanh_of(__m512 x) {
    __m512 size = _mm512_min_ps(constant(20.0f), _mm512_abs_ps(x)); /* of a NaN and a number, what stands second */
    __m512 small = exp2_of(_mm512_mul_ps(size, constant(-2.8853901f))); /* 2 log2(e) */
    __m512 one = constant(1.0f), y = _mm512_div_ps(_mm512_sub_ps(one, small), _mm512_add_ps(one, small));
    __m512 sign = _mm512_and_ps(x, constant(-0.0f));
    return _mm512_or_ps(y, sign);
}

/* An off-ramp's last product, of the tanh of its dense layer: (rows, width) -> (rows, classes). width is a multiple of
 * 16; row: as many float32, to work in.
 */
FOR_THIS_CPU void deebert_classify(const bf16 *x, int64_t rows, int64_t width, const bf16 *weight, const bf16 *bias,
                                   int64_t classes, float *row, float *out) {
    for (int64_t r = 0; r < rows; r++, x += width, out += classes) {
        for (int64_t i = 0; i < width; i += LANES) _mm512_storeu_ps(row + i, tanh_of(load(x + i)));
        for (int64_t c = 0; c < classes; c++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < width; i += LANES)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(row + i), load(weight + c * width + i), sum);
            uint32_t first = (uint32_t)bias[c] << 16;
            float offset;
            memcpy(&offset, &first, sizeof offset);
            out[c] = _mm512_reduce_add_ps(sum) + offset;
        }
    }
}

KERNEL __m512 load_times(const bf16 *x, const float *by, int64_t i) {
    return by ? _mm512_mul_ps(load(x + i), _mm512_loadu_ps(by + i)) : load(x + i);
}

/* Each row as bytes: x · by ≈ scale · byte + minimum. What is no number, or infinite, makes its row's scale no number.
 * The scale of a row of equal numbers is 1.
 *
 * by: (width), or none for 1; width is a multiple of 16.
 */
FOR_THIS_CPU void deebert_quantize(const bf16 *x, int64_t rows, int64_t width, const float *by, uint8_t *bytes,
                                   float *scales, float *minima) {
    for (int64_t r = 0; r < rows; r++, x += width, bytes += width) {
        __m512 least = constant(__builtin_inff()), most = constant(-__builtin_inff()), flaw = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 y = load_times(x, by, i);
            least = _mm512_min_ps(least, y), most = _mm512_max_ps(most, y);
            flaw = _mm512_fmadd_ps(y, _mm512_setzero_ps(), flaw);
        }
        float minimum = _mm512_reduce_min_ps(least), range = _mm512_reduce_max_ps(most) - minimum;
        __m512 first = constant(minimum), steps = constant(range > 0 ? 255 / range : 0);
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 y = load_times(x, by, i);
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(y, first), steps));
            _mm_storeu_si128((__m128i *)(bytes + i), _mm512_cvtusepi32_epi8(whole));
        }
        scales[r] = (range > 0 ? range / 255 : 1) + _mm512_reduce_add_ps(flaw);
        minima[r] = minimum;
    }
}

/* What bytes' products stand for: product · scale + minimum · weight_sum + bias, of each row's scale and minimum.
 * width is a multiple of 16.
 */
FOR_THIS_CPU void deebert_rescale(const float *product, int64_t rows, int64_t width, const float *scales,
                                  const float *minima, const float *weight_sum, const float *bias, bf16 *out) {
    for (int64_t r = 0; r < rows; r++, product += width, out += width) {
        __m512 scale = constant(scales[r]), minimum = constant(minima[r]);
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 y = _mm512_fmadd_ps(minimum, _mm512_loadu_ps(weight_sum + i), _mm512_loadu_ps(bias + i));
            store(out + i, _mm512_fmadd_ps(_mm512_loadu_ps(product + i), scale, y));
        }
    }
}

#else

int deebert_runs_here(void) { return 0; }

#endif
