/* What is done to each row, each number or each sequence by itself: GELU, the sum of two blocks normalized, a sequence's
 * mean, plain or weighted, an off-ramp's answer, and to bytes and back where the products are of bytes.
 */
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include "kernels.h"

/* Of what a thread does at a time: what takes it 5 to 10 microseconds, as long as it takes to wake. */
enum { LEAST_NUMBERS = 16384, LEAST_ROWS = 64, LEAST_SEQUENCES = 16 };

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
    bf16 *x;
    const bf16 *residual, *weight, *bias;
    int64_t width;
    float eps;
} AddNorm;

FOR_THIS_CPU static void add_norm(const void *task, int64_t first, int64_t last, int64_t thread) {
    const AddNorm *a = task;
    const bf16 *weight = a->weight, *bias = a->bias;
    int64_t width = a->width;
    for (int64_t r = first; r < last; r++) {
        bf16 *x = a->x + r * width;
        const bf16 *residual = a->residual + r * width;
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += LANES)
            sum = _mm512_add_ps(sum, _mm512_add_ps(load(x + i), load(residual + i)));
        __m512 mean = constant(_mm512_reduce_add_ps(sum) / width);
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 y = _mm512_sub_ps(_mm512_add_ps(load(x + i), load(residual + i)), mean);
            squares = _mm512_fmadd_ps(y, y, squares);
        }
        __m512 variance = constant(_mm512_reduce_add_ps(squares) / width + a->eps);
        __m512 over_deviation = _mm512_div_ps(constant(1.0f), _mm512_sqrt_ps(variance));
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 y = _mm512_sub_ps(_mm512_add_ps(load(x + i), load(residual + i)), mean);
            y = _mm512_mul_ps(y, over_deviation);
            store(x + i, _mm512_fmadd_ps(y, load(weight + i), load(bias + i)));
        }
    }
}

/* Each row of x + residual, normalized; in place of x. width is a multiple of 16. */
void deebert_add_norm(bf16 *x, const bf16 *residual, int64_t rows, int64_t width, const bf16 *weight, const bf16 *bias,
                      float eps, Fork fork, int64_t threads) {
    AddNorm a = {x, residual, weight, bias, width, eps};
    share((Team){fork, threads}, rows, LEAST_ROWS, add_norm, &a);
}

typedef struct {
    const bf16 *states;
    const int64_t *offsets;
    int64_t width;
    bf16 *out;
} Mean;

FOR_THIS_CPU static void mean(const void *task, int64_t first, int64_t last, int64_t thread) {
    const Mean *m = task;
    const int64_t *offsets = m->offsets, width = m->width;
    const bf16 *states = m->states;
    for (int64_t n = first; n < last; n++) {
        __m512 share = constant(1.0f / (offsets[n + 1] - offsets[n]));
        for (int64_t i = 0; i < width; i += 4 * LANES) {
            int64_t vectors = width - i < 4 * LANES ? (width - i) / LANES : 4;
            __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int64_t t = offsets[n]; t < offsets[n + 1]; t++)
                for (int64_t v = 0; v < vectors; v++)
                    sums[v] = _mm512_add_ps(sums[v], load(states + t * width + i + v * LANES));
            for (int64_t v = 0; v < vectors; v++)
                store(m->out + n * width + i + v * LANES, _mm512_mul_ps(sums[v], share));
        }
    }
}

/* The mean of each sequence's rows: (tokens, width) -> (sequences, width); width is a multiple of 16. */
void deebert_mean(const bf16 *states, const int64_t *offsets, int64_t sequences, int64_t width, bf16 *out, Fork fork,
                  int64_t threads) {
    Mean m = {states, offsets, width, out};
    share((Team){fork, threads}, sequences, LEAST_SEQUENCES, mean, &m);
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
    share((Team){fork, threads}, pieces, LEAST_SEQUENCES, gather, &g);
}

typedef struct {
    const bf16 *states, *query;
    const int64_t *offsets;
    int64_t width, longest;
    float *weights;
    bf16 *out;
} Attended;

/* What each token of a sequence weighs: e^(its product with the query - the largest), and one over their sum. */
KERNEL float weigh(const bf16 *states, const bf16 *query, int64_t length, int64_t width, float *weights) {
    float largest = -__builtin_inff();
    for (int64_t t = 0; t < length; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += LANES)
            sum = _mm512_fmadd_ps(load(states + t * width + i), load(query + i), sum);
        weights[t] = _mm512_reduce_add_ps(sum);
        largest = weights[t] > largest ? weights[t] : largest;
    }
    __m512 sum = _mm512_setzero_ps(), log2_e = constant(1.44269504f), shift = constant(largest);
    for (int64_t t = 0; t < length; t += LANES) {
        __mmask16 there = first_lanes(length - t);
        __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(there, weights + t), shift);
        x = _mm512_maskz_mov_ps(there, exp2_of(_mm512_mul_ps(x, log2_e)));
        sum = _mm512_add_ps(sum, x);
        _mm512_mask_storeu_ps(weights + t, there, x);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

FOR_THIS_CPU static void attended(const void *task, int64_t first, int64_t last, int64_t thread) {
    const Attended *a = task;
    int64_t width = a->width;
    float *weights = a->weights + thread * a->longest;
    for (int64_t n = first; n < last; n++) {
        int64_t length = a->offsets[n + 1] - a->offsets[n];
        const bf16 *states = a->states + a->offsets[n] * width;
        __m512 over_sum = constant(weigh(states, a->query, length, width, weights));
        for (int64_t i = 0; i < width; i += 4 * LANES) {
            int64_t vectors = width - i < 4 * LANES ? (width - i) / LANES : 4;
            __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int64_t t = 0; t < length; t++)
                for (int64_t v = 0; v < vectors; v++)
                    sums[v] = _mm512_fmadd_ps(constant(weights[t]), load(states + t * width + i + v * LANES), sums[v]);
            for (int64_t v = 0; v < vectors; v++)
                store(a->out + n * width + i + v * LANES, _mm512_mul_ps(sums[v], over_sum));
        }
    }
}

/* The mean of each sequence's rows, weighted by the softmax of their products with a query: (tokens, width) ->
 * (sequences, width). width is a multiple of 16; weights: as many float32 for each thread as the longest has rows, to
 * work in.
 */
void deebert_attended(const bf16 *states, const int64_t *offsets, int64_t sequences, int64_t width, const bf16 *query,
                      int64_t longest, float *weights, bf16 *out, Fork fork, int64_t threads) {
    Attended a = {states, query, offsets, width, longest, weights, out};
    share((Team){fork, threads}, sequences, LEAST_SEQUENCES, attended, &a);
}

/* tanh, to 2e-6: of what is no number, none. */
KERNEL __m512 tanh_of(__m512 x) {
    __m512 size = _mm512_min_ps(constant(20.0f), _mm512_abs_ps(x)); /* of a NaN and a number, what stands second */
    __m512 small = exp2_of(_mm512_mul_ps(size, constant(-2.8853901f))); /* 2 log2(e) */
    __m512 one = constant(1.0f), y = _mm512_div_ps(_mm512_sub_ps(one, small), _mm512_add_ps(one, small));
    __m512 sign = _mm512_and_ps(x, constant(-0.0f));
    return _mm512_or_ps(y, sign);
}

typedef struct {
    const bf16 *x, *weight, *bias;
    int64_t width, classes;
    float *row, *out;
} Classify;

FOR_THIS_CPU static void classify(const void *task, int64_t first, int64_t last, int64_t thread) {
    const Classify *a = task;
    int64_t width = a->width;
    float *row = a->row + thread * width;
    for (int64_t r = first; r < last; r++) {
        const bf16 *x = a->x + r * width;
        for (int64_t i = 0; i < width; i += LANES) _mm512_storeu_ps(row + i, tanh_of(load(x + i)));
        for (int64_t c = 0; c < a->classes; c++) {
            const bf16 *weight = a->weight + c * width;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < width; i += LANES)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(row + i), load(weight + i), sum);
            uint32_t upper = (uint32_t)a->bias[c] << 16;
            float offset;
            memcpy(&offset, &upper, sizeof offset);
            a->out[r * a->classes + c] = _mm512_reduce_add_ps(sum) + offset;
        }
    }
}

/* An off-ramp's last product, of the tanh of its dense layer: (rows, width) -> (rows, classes). width is a multiple of
 * 16; row: as many float32 for each thread, to work in.
 */
void deebert_classify(const bf16 *x, int64_t rows, int64_t width, const bf16 *weight, const bf16 *bias,
                      int64_t classes, float *row, float *out, Fork fork, int64_t threads) {
    Classify a = {x, weight, bias, width, classes, row, out};
    share((Team){fork, threads}, rows, LEAST_ROWS, classify, &a);
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
