/* FAVOR#'s fit to the tokens of a row and head: moments, the features' constants, and tokens in their coordinates.

`ops/favor/fitted.py` has the mathematics, and the same in torch.
*/
#include "tokens.h"

#define BALANCE_LIMIT 1048576.0f /* as in ops/favor/moments.py */

typedef double wide_vec __attribute__((vector_size(8 * LANES)));

/* A side (queries, then keys): tokens; the same moved, and their bias. */
typedef struct {
    Tokens tokens, moved, bias;
} Side;

/* shape: `[batch, heads]`. factor, square, other: `[2, batch, heads, dim]`. */
typedef struct {
    long batch, heads, tokens, dim, balances, centres;
    Side sides[2];
    float *shape, *factor, *square, *other;
} Call;

INLINE wide_vec widened(vec x) { return __builtin_convertvector(x, wide_vec); }
INLINE vec narrowed(wide_vec x) { return __builtin_convertvector(x, vec); }

/* Mean of every column, and the mean square of what it leaves; sums in float64. */
static void moments(const float *rows, long count, long width, float *mean, float *second) {
    for (long d = 0; d < width; d += LANES) {
        wide_vec sums[2] = {{0}, {0}}, squares[2] = {{0}, {0}}; /* in turn: additions wait for each other */
        for (long t = 0; t < count; t++) sums[t % 2] += widened(load(rows + t * width + d));
        vec middle = narrowed((sums[0] + sums[1]) / (double)count);
        for (long t = 0; t < count; t++) {
            vec rest = load(rows + t * width + d) - middle;
            squares[t % 2] += widened(rest * rest);
        }
        store(mean + d, middle);
        store(second + d, narrowed((squares[0] + squares[1]) / (double)count));
    }
}

/* Factors of coordinates with which both sides have equal second moments, and the `a` of the features. */
static float fit(const Call *call, const float *mean, const float *second, long width, float *transform) {
    const float eps = 1.1920929e-7f, least = 256 * eps * eps;
    float phi = 0, common = 0;
    for (long d = 0; d < call->dim; d++) {
        float own[2], forward = 1;
        for (int side = 0; side < 2; side++) {
            float middle = mean[side * width + d], found = second[side * width + d];
            if (!call->centres) own[side] = found + middle * middle;
            else own[side] = found - least * middle * middle <= 0 ? 0 : found; /* rounding of a mean is no moment */
        }
        if (call->balances && !(own[0] <= 0 || own[1] <= 0)) {
            forward = sqrtf(sqrtf(own[1] / own[0]));
            if (forward < 1 / BALANCE_LIMIT) forward = 1 / BALANCE_LIMIT;
            if (forward > BALANCE_LIMIT) forward = BALANCE_LIMIT;
        }
        transform[d] = forward;
        transform[width + d] = 1 / forward;
        phi += own[0] * transform[d] * transform[d] + own[1] * transform[width + d] * transform[width + d];
        common += mean[d] * mean[width + d];
    }
    phi /= (float)call->dim;
    if (!call->centres) {
        phi += 2 * common / (float)call->dim;
        if (phi < 0) phi = 0;
    }
    return (1 - 2 * phi - sqrtf((2 * phi + 6) * 2 * phi + 1)) / 16;
}

/* Moved tokens in place of `rows`, and biases: `c . (other - square c / 2)` of the centred tokens `c`, plus `common`. */
static void move(
    float *rows, long count, long width, const float *mean, const float *other, const float *square,
    const float *factor, float common, float *bias
) {
    for (long t = 0; t < count; t++) {
        vec dot = {0};
        for (long d = 0; d < width; d += LANES) {
            vec rest = load(rows + t * width + d) - load(mean + d);
            dot += rest * (load(other + d) - load(square + d) * rest * 0.5f);
            store(rows + t * width + d, rest * load(factor + d));
        }
        bias[t] = sum_of(dot) + common;
    }
}

/* The pairs of a row and a head from `first` to before `last`. 0 if done; 2: no memory. */
int fit_rows(const Call *call, long first, long last) {
    long width = padded(call->dim), count = call->tokens;
    Memory memory = take_memory(2 * count * width + padded(count) + 10 * width), rest = memory;
    if (!memory.next) return 2;
    float *rows[2] = {part_of(&rest, count * width), part_of(&rest, count * width)};
    float *bias = part_of(&rest, count), *mean = part_of(&rest, 2 * width), *second = part_of(&rest, 2 * width);
    float *transform = part_of(&rest, 2 * width), *square = part_of(&rest, width);
    float *factor = part_of(&rest, width), *other = part_of(&rest, width);
    for (long pair = first; pair < last; pair++) {
        long batch = pair / call->heads, head = pair % call->heads;
        for (int side = 0; side < 2; side++) {
            gather(NULL, count, call->sides[side].tokens, batch, head, call->dim, 1, rows[side]);
            moments(rows[side], count, width, mean + side * width, second + side * width);
        }
        memset(transform, 0, (size_t)(2 * width) * sizeof(float));
        float shape = fit(call, mean, second, width, transform), base = 1 - 4 * shape, stretch = sqrtf(base);
        float common = logf(base) * (float)call->dim / 2;
        if (call->centres)
            for (long d = 0; d < call->dim; d++) common += mean[d] * mean[width + d];
        else memset(mean, 0, (size_t)(2 * width) * sizeof(float));
        call->shape[pair] = shape;
        for (int side = 0; side < 2; side++) {
            const Side *to = &call->sides[side];
            long start = (side * call->batch * call->heads + pair) * call->dim;
            for (long d = 0; d < width; d++) {
                float own = transform[side * width + d];
                square[d] = own * own;
                factor[d] = own * stretch;
                other[d] = mean[(1 - side) * width + d];
            }
            move(rows[side], count, width, mean + side * width, other, square, factor, side ? 0 : common, bias);
            scatter(NULL, count, to->moved, batch, head, call->dim, 1, rows[side]);
            for (long t = 0; t < count; t++) *token_at(to->bias, batch, head, t) = bias[t];
            memcpy(call->square + start, square, (size_t)call->dim * sizeof(float));
            memcpy(call->factor + start, factor, (size_t)call->dim * sizeof(float));
            memcpy(call->other + start, other, (size_t)call->dim * sizeof(float));
        }
    }
    give_memory_back(memory);
    return 0;
}
