/* Vectors, and the products that attention of one head is made of, for any CPU that the compiler knows.

Tokens of a window are the lanes of vectors: the sums of a softmax go from row to row, and none goes across lanes. A
matrix has rows of whole vectors (`padded`); what stands behind its last column is never read as a number.
*/
#pragma once

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define ROWS 8 /* of a result in registers */
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#define ROWS 4
#else
#define LANES 4
#define ROWS 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *x) { return *(const loose *)x; }
INLINE void store(float *x, vec value) { *(loose *)x = value; }
INLINE vec all(float x) { return x - (vec){0}; }

/* The larger one; `b` where one is not a number. */
INLINE vec larger(vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    ivec takes_a = a > b;
    return (vec)((takes_a & (ivec)a) | (~takes_a & (ivec)b));
#endif
}

INLINE float sum_of(vec x) {
    float sum = 0;
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    sum = x[0];
    return sum;
}

INLINE float largest_of(vec x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

/* e^x to a unit in the last place; 0 where it is below the smallest normal number. */
INLINE vec exponential(vec x) {
    const float lowest = -87.33654f, shifter = 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    ivec is_some = ~(x < all(lowest));
    x = larger(all(lowest), x);
    vec shifted = x * 1.44269504f + shifter;
    vec power = shifted - shifter;
    vec rest = x - power * 0.693359375f + power * 2.12194440e-4f;
    vec sum = all(1.9875691500e-4f);
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    return (vec)(((ivec)sum + ((ivec)shifted << 23)) & is_some);
}

INLINE long padded(long count) { return (count + LANES - 1) / LANES * LANES; }

/* A matrix that is read number by number: the element of row i and column k is at[i * row + k * column]. */
typedef struct {
    const float *at;
    long row, column;
} Left;

INLINE Left rows_of(const float *at, long width) { return (Left){at, width, 1}; }
INLINE Left columns_of(const float *at, long width) { return (Left){at, 1, width}; }

INLINE void product_tile(
    const int rows, const int vecs, const int adds, long depth, Left a, const float *b, long width_b, float *c,
    long width_c
) {
    vec sums[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) sums[i][v] = adds ? load(c + i * width_c + v * LANES) : (vec){0};
    for (long k = 0; k < depth; k++) {
        vec right[2];
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) right[v] = load(b + k * width_b + v * LANES);
        const float *column = a.at + k * a.column;
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            vec left = all(column[i * a.row]);
#pragma GCC unroll 2
            for (int v = 0; v < vecs; v++) sums[i][v] += left * right[v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) store(c + i * width_c + v * LANES, sums[i][v]);
}

INLINE void product_rows(
    const int vecs, const int adds, long count, long depth, Left a, const float *b, long width_b, float *c,
    long width_c
) {
    long i = 0;
    for (; i + ROWS <= count; i += ROWS) {
        Left part = {a.at + i * a.row, a.row, a.column};
        product_tile(ROWS, vecs, adds, depth, part, b, width_b, c + i * width_c, width_c);
    }
    for (; i + 2 <= count; i += 2) {
        Left part = {a.at + i * a.row, a.row, a.column};
        product_tile(2, vecs, adds, depth, part, b, width_b, c + i * width_c, width_c);
    }
    if (i < count) {
        Left part = {a.at + i * a.row, a.row, a.column};
        product_tile(1, vecs, adds, depth, part, b, width_b, c + i * width_c, width_c);
    }
}

INLINE void product_of(
    const int adds, long count, long columns, long depth, Left a, const float *b, long width_b, float *c, long width_c
) {
    long n = 0;
    for (; n + 2 * LANES <= columns; n += 2 * LANES)
        product_rows(2, adds, count, depth, a, b + n, width_b, c + n, width_c);
    if (n < columns) product_rows(1, adds, count, depth, a, b + n, width_b, c + n, width_c);
}

/* c = a b of `count` rows, `columns` (whole vectors) columns, and sums of `depth` terms. */
static void product(
    long count, long columns, long depth, Left a, const float *b, long width_b, float *c, long width_c
) {
    product_of(0, count, columns, depth, a, b, width_b, c, width_c);
}

/* c += a b. */
static void add_product(
    long count, long columns, long depth, Left a, const float *b, long width_b, float *c, long width_c
) {
    product_of(1, count, columns, depth, a, b, width_b, c, width_c);
}

/* A square of vectors, in place. */
INLINE void transpose_square(vec x[LANES]) {
#if defined(__clang__)
    float at[LANES][LANES];
    for (int i = 0; i < LANES; i++) store(at[i], x[i]);
    for (int i = 0; i < LANES; i++)
        for (int k = 0; k < LANES; k++) x[i][k] = at[k][i];
#else
    ivec low, high; /* of two vectors, in turn */
    for (int i = 0; i < LANES; i++) low[i] = i / 2 + i % 2 * LANES, high[i] = low[i] + LANES / 2;
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        vec mixed[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            mixed[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], low);
            mixed[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = mixed[i];
    }
#endif
}

/* `[count][width_from]` -> `[width][width_to]`, of whole vectors; zeros behind the last row. */
static void transpose(long count, long width, const float *from, long width_from, float *to, long width_to) {
    for (long t = 0; t < width_to; t += LANES)
        for (long d = 0; d < width; d += LANES) {
            vec square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) square[i] = t + i < count ? load(from + (t + i) * width_from + d) : (vec){0};
            transpose_square(square);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (d + i < width) store(to + (d + i) * width_to + t, square[i]);
        }
}

/* Memory that the calls of a thread use again: taken anew, its pages cost as much as the arithmetic. */
#define MOST_KEPT (16L << 20)

typedef struct {
    float *next, *owned;
} Memory;

static _Thread_local float *kept_memory;
static _Thread_local long kept_bytes;
static pthread_key_t kept_key; /* frees it when its thread ends */
static pthread_once_t kept_once = PTHREAD_ONCE_INIT;

static void make_key(void) { pthread_key_create(&kept_key, free); }

static float *aligned_memory(long bytes) {
    void *found = NULL;
    return posix_memalign(&found, 64, (size_t)bytes) ? NULL : found;
}

/* Of so many numbers; `next` is NULL if there is none. */
static Memory take_memory(long numbers) {
    long bytes = numbers * (long)sizeof(float);
    if (bytes > MOST_KEPT) {
        float *own = aligned_memory(bytes);
        return (Memory){own, own};
    }
    if (bytes > kept_bytes) {
        free(kept_memory);
        kept_memory = aligned_memory(bytes);
        kept_bytes = kept_memory ? bytes : 0;
        pthread_once(&kept_once, make_key);
        pthread_setspecific(kept_key, kept_memory);
    }
    return (Memory){kept_memory, NULL};
}

static void give_memory_back(Memory memory) { free(memory.owned); }

/* So many of its numbers, from a whole vector on. */
INLINE float *part_of(Memory *memory, long numbers) {
    float *found = memory->next;
    memory->next += padded(numbers);
    return found;
}
