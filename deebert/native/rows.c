/* What is done to each row or each number by itself: GELU, a layer's normalizations, rows put elsewhere, and to bytes and
 * back where the products are of bytes.
 */
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include "kernels.h"

/* Of what a thread does at a time: what takes it 5 to 10 microseconds, as long as it takes to wake. */
enum { LEAST_NUMBERS = 16384, LEAST_ROWS = 64, LEAST_PIECES = 16 };

int deebert_runs_here(void) {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
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

FOR_THIS_CPU static void gelu(const void *task, int64_t first, int64_t last, int64_t thread) {
    bf16 *x = *(bf16 *const *)task;
    int64_t i = first;
    for (; i + LANES <= last; i += LANES) store(x + i, gelu_of(load(x + i)));
    if (i < last) {
        bf16 rest[LANES] = {0};
        memcpy(rest, x + i, (last - i) * sizeof *x);
        store(rest, gelu_of(load(rest)));
        memcpy(x + i, rest, (last - i) * sizeof *x);
    }
}

/* In place. */
void deebert_gelu(bf16 *x, int64_t count, Fork fork, int64_t threads) {
    share((Team){fork, threads}, count, LEAST_NUMBERS, gelu, &x);
}

typedef struct {
    const bf16 *weight, *bias;
    int64_t width;
    float eps;
} Norm;

/* (row - its mean) / its standard deviation · weight + bias. `sum` is the row's, lane by lane. */
KERNEL void normalize(Norm norm, const float *row, __m512 sum, bf16 *out) {
    int64_t width = norm.width;
    __m512 squares = _mm512_setzero_ps(), mean = constant(_mm512_reduce_add_ps(sum) / width);
    for (int64_t i = 0; i < width; i += LANES) {
        __m512 y = _mm512_sub_ps(_mm512_loadu_ps(row + i), mean);
        squares = _mm512_fmadd_ps(y, y, squares);
    }
    __m512 variance = constant(_mm512_reduce_add_ps(squares) / width + norm.eps);
    __m512 over_deviation = _mm512_div_ps(constant(1.0f), _mm512_sqrt_ps(variance));
    for (int64_t i = 0; i < width; i += LANES) {
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + i), mean), over_deviation);
        store(out + i, _mm512_fmadd_ps(y, load(norm.weight + i), load(norm.bias + i)));
    }
}

typedef struct {
    bf16 *x;
    const bf16 *residual;
    Norm norm;
    float *row;
} AddNorm;

FOR_THIS_CPU static void add_norm(const void *task, int64_t first, int64_t last, int64_t thread) {
    const AddNorm *a = task;
    int64_t width = a->norm.width;
    float *row = a->row + thread * width;
    for (int64_t r = first; r < last; r++) {
        bf16 *x = a->x + r * width;
        const bf16 *residual = a->residual + r * width;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 y = _mm512_add_ps(load(x + i), load(residual + i));
            _mm512_storeu_ps(row + i, y);
            sum = _mm512_add_ps(sum, y);
        }
        normalize(a->norm, row, sum, x);
    }
}

/* Each row of x + residual, normalized; in place of x. width is a multiple of 16; row: as many float32 for each thread,
 * to work in.
 */
void deebert_add_norm(bf16 *x, const bf16 *residual, int64_t rows, int64_t width, const bf16 *weight, const bf16 *bias,
                      float eps, float *row, Fork fork, int64_t threads) {
    AddNorm a = {x, residual, {weight, bias, width, eps}, row};
    share((Team){fork, threads}, rows, LEAST_ROWS, add_norm, &a);
}

typedef struct {
    const int32_t *ids, *types;
    const int64_t *positions;
    const bf16 *of_ids, *of_types, *of_positions;
    Norm norm;
    float *row;
    bf16 *out;
} Embed;

FOR_THIS_CPU static void embed(const void *task, int64_t first, int64_t last, int64_t thread) {
    const Embed *e = task;
    int64_t width = e->norm.width;
    float *row = e->row + thread * width;
    for (int64_t t = first; t < last; t++) {
        const bf16 *of_id = e->of_ids + e->ids[t] * width;
        const bf16 *of_position = e->of_positions + e->positions[t] * width;
        const bf16 *of_type = e->of_types ? e->of_types + (e->types ? e->types[t] : 0) * width : 0;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 y = _mm512_add_ps(load(of_id + i), load(of_position + i));
            if (of_type) y = _mm512_add_ps(y, load(of_type + i));
            _mm512_storeu_ps(row + i, y);
            sum = _mm512_add_ps(sum, y);
        }
        normalize(e->norm, row, sum, e->out + t * width);
    }
}

/* What each token's state starts from: the sum of its rows of three tables, normalized: (tokens) -> (tokens, width).
 *
 * types: none where all are of the first one; of_types: none where tokens have no type. Every number is within its
 * table. width is a multiple of 16; row: as many float32 for each thread, to work in.
 */
void deebert_embed(const int32_t *ids, const int32_t *types, const int64_t *positions, int64_t tokens,
                   const bf16 *of_ids, const bf16 *of_types, const bf16 *of_positions, int64_t width,
                   const bf16 *weight, const bf16 *bias, float eps, float *row, bf16 *out, Fork fork,
                   int64_t threads) {
    Embed e = {ids, types, positions, of_ids, of_types, of_positions, {weight, bias, width, eps}, row, out};
    share((Team){fork, threads}, tokens, LEAST_ROWS, embed, &e);
}

typedef struct {
    const int64_t *from, *offsets;
    char *to;
} Gather;

static void gather(const void *task, int64_t first, int64_t last, int64_t thread) {
    const Gather *g = task;
    for (int64_t n = first; n < last; n++)
        memcpy(g->to + g->offsets[n], (const char *)g->from[n], g->offsets[n + 1] - g->offsets[n]);
}

/* Pieces of memory, one after the other: piece i lies at from[i] and goes to bytes offsets[i] to offsets[i + 1]. */
void deebert_gather(const int64_t *from, const int64_t *offsets, int64_t pieces, char *to, Fork fork, int64_t threads) {
    Gather g = {from, offsets, to};
    share((Team){fork, threads}, pieces, LEAST_PIECES, gather, &g);
}

KERNEL __m512 load_times(const bf16 *x, const float *by, int64_t i) {
    return by ? _mm512_mul_ps(load(x + i), _mm512_loadu_ps(by + i)) : load(x + i);
}

typedef struct {
    const bf16 *x;
    int64_t width;
    const float *by;
    uint8_t *bytes;
    float *scales, *minima;
} Quantize;

FOR_THIS_CPU static void quantize(const void *task, int64_t first_row, int64_t last_row, int64_t thread) {
    const Quantize *q = task;
    int64_t width = q->width;
    const float *by = q->by;
    for (int64_t r = first_row; r < last_row; r++) {
        const bf16 *x = q->x + r * width;
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
            _mm_storeu_si128((__m128i *)(q->bytes + r * width + i), _mm512_cvtusepi32_epi8(whole));
        }
        q->scales[r] = (range > 0 ? range / 255 : 1) + _mm512_reduce_add_ps(flaw);
        q->minima[r] = minimum;
    }
}

/* Each row as bytes: x · by ≈ scale · byte + minimum. What is no number, or infinite, makes its row's scale no number.
 * The scale of a row of equal numbers is 1.
 *
 * by: (width), or none for 1; width is a multiple of 16.
 */
void deebert_quantize(const bf16 *x, int64_t rows, int64_t width, const float *by, uint8_t *bytes, float *scales,
                      float *minima, Fork fork, int64_t threads) {
    Quantize q = {x, width, by, bytes, scales, minima};
    share((Team){fork, threads}, rows, LEAST_ROWS, quantize, &q);
}

typedef struct {
    const float *product, *scales, *minima, *weight_sum, *bias;
    int64_t width;
    bf16 *out;
} Rescale;

FOR_THIS_CPU static void rescale(const void *task, int64_t first, int64_t last, int64_t thread) {
    const Rescale *a = task;
    const float *weight_sum = a->weight_sum, *bias = a->bias;
    int64_t width = a->width;
    for (int64_t r = first; r < last; r++) {
        const float *product = a->product + r * width;
        bf16 *out = a->out + r * width;
        __m512 scale = constant(a->scales[r]), minimum = constant(a->minima[r]);
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 y = _mm512_fmadd_ps(minimum, _mm512_loadu_ps(weight_sum + i), _mm512_loadu_ps(bias + i));
            store(out + i, _mm512_fmadd_ps(_mm512_loadu_ps(product + i), scale, y));
        }
    }
}

/* What bytes' products stand for: product · scale + minimum · weight_sum + bias, of each row's scale and minimum.
 * width is a multiple of 16.
 */
void deebert_rescale(const float *product, int64_t rows, int64_t width, const float *scales, const float *minima,
                     const float *weight_sum, const float *bias, bf16 *out, Fork fork, int64_t threads) {
    Rescale a = {product, scales, minima, weight_sum, bias, width, out};
    share((Team){fork, threads}, rows, LEAST_ROWS, rescale, &a);
}

#else

int deebert_runs_here(void) { return 0; }

#endif
