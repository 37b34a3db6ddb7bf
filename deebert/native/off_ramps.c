/* What an off-ramp does: it reads a sequence's states, plainly or weighted, and answers, more or less surely. */
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include "kernels.h"

#include <math.h>

/* Of what a thread does at a time: what takes it 5 to 10 microseconds, as long as it takes to wake. */
enum { LEAST_SEQUENCES = 16, LEAST_ROWS = 64, LEAST_ANSWERS = 256 };

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

typedef struct {
    const float *logits;
    int64_t classes;
    float *out;
} Entropy;

static void entropy(const void *task, int64_t first, int64_t last, int64_t thread) {
    const Entropy *e = task;
    for (int64_t r = first; r < last; r++) {
        const float *z = e->logits + r * e->classes;
        int64_t largest = 0;
        for (int64_t c = 1; c < e->classes; c++)
            if (z[c] > z[largest]) largest = c;
        /* Of all but the largest, so that nothing is lost beside its 1 where the others are tiny. */
        float others = 0, weighted = 0;
        for (int64_t c = 0; c < e->classes; c++) {
            float below = z[c] - z[largest], share = expf(below);
            if (c != largest) others += share, weighted += share * below;
        }
        e->out[r] = log1pf(others) - weighted / (1 + others);
    }
}

/* -Σ p ln p of each row's softmax, in nats: (rows, classes) -> (rows). */
void deebert_entropy(const float *logits, int64_t rows, int64_t classes, float *out, Fork fork, int64_t threads) {
    Entropy e = {logits, classes, out};
    share((Team){fork, threads}, rows, LEAST_ANSWERS, entropy, &e);
}

#endif
