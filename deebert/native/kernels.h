/* What the kernels share: sixteen numbers at a time, and their work among threads. For CPUs with AVX-512 and bfloat16
 * (Intel since Cooper Lake, AMD since Zen 4), which is asked at run time (`deebert_runs_here`): the rest of the program
 * is built for any. Knows nothing of tensors: sizes and addresses are checked by whoever calls.
 *
 * A bfloat16 is the upper half of a float32. Sums and exponentials are float32, and each result is rounded once.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define FOR_THIS_CPU __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
/* Where sizes are constants, loops over them leave no loop and arrays become registers. */
#define KERNEL static inline __attribute__((always_inline)) FOR_THIS_CPU

typedef uint16_t bf16;

enum { LANES = 16 };

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

/* OpenMP's `GOMP_parallel`: runs a function with its argument on so many threads, one of them the caller's.
 *
 * Its address comes from whoever calls a kernel, for it must be that of torch's OpenMP: threads of another one would
 * fight with torch's, which stay awake for a while after each of its operations.
 */
typedef void (*Fork)(void (*function)(void *), void *argument, unsigned threads, unsigned flags);

/* Whose threads, and how many. */
typedef struct {
    Fork fork;
    int64_t threads;
} Team;

/* Work on items `first` to `last` (exclusive); `thread`, from 0, is whose room to work in. */
typedef void (*Part)(const void *task, int64_t first, int64_t last, int64_t thread);

typedef struct {
    Part part;
    const void *task;
    int64_t count, together, next, threads;
} Shared;

static inline void take_parts(void *argument) {
    Shared *s = argument;
    int64_t first, thread = __atomic_fetch_add(&s->threads, 1, __ATOMIC_RELAXED);
    while ((first = __atomic_fetch_add(&s->next, s->together, __ATOMIC_RELAXED)) < s->count) {
        int64_t last = first + s->together;
        s->part(s->task, first, last < s->count ? last : s->count, thread);
    }
}

/* All `count` items, each once, in parts of a multiple of `least`: what is less than two parts is not worth waking
 * another thread for. Four parts a thread, so that one that is late leaves its share to the others.
 */
static inline void share(Team team, int64_t count, int64_t least, Part part, const void *task) {
    int64_t together = count / (4 * team.threads) / least * least;
    Shared s = {.part = part, .task = task, .count = count, .together = together < least ? least : together};
    if (team.threads == 1 || count <= s.together)
        part(task, 0, count, 0);
    else
        team.fork(take_parts, &s, (unsigned)team.threads, 0);
}
