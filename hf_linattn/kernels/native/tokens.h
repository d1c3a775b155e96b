/* Tokens and slots of one row and head: from tensors into rows of whole vectors, and back.

Places are the tokens of all windows, one window after the other; some have no token (behind the end of a row, or of an
image). `token_of` has the number of the token at every place, -1 for none; without it a place has the token of its number.
*/
#pragma once

#include "arithmetic.h"

/* `[batch, tokens, heads(, dim)]`, with strides in numbers; NULL for none. */
typedef struct {
    float *at;
    long batch, token, head;
} Tokens;

/* `[batch or 1, heads, slots(, dim)]`. */
typedef struct {
    float *at;
    long batch, head, slot;
} Slots;

INLINE float *token_at(Tokens x, long batch, long head, long token) {
    return x.at + batch * x.batch + head * x.head + token * x.token;
}

/* Of `count` places, times `factor`; zeros for places without a token. */
static void gather(
    const int64_t *token_of, long count, Tokens x, long batch, long head, long dim, float factor, float *rows
) {
    long width = padded(dim), whole = dim / LANES * LANES;
    for (long place = 0; place < count; place++, rows += width) {
        long token = token_of ? token_of[place] : place;
        if (token < 0) {
            memset(rows, 0, (size_t)width * sizeof(float));
            continue;
        }
        const float *from = token_at(x, batch, head, token);
        for (long d = 0; d < whole; d += LANES) store(rows + d, load(from + d) * factor);
        for (long d = whole; d < width; d++) rows[d] = d < dim ? from[d] * factor : 0;
    }
}

/* To the tokens of `count` places, times `factor`. */
static void scatter(
    const int64_t *token_of, long count, Tokens x, long batch, long head, long dim, float factor, const float *rows
) {
    long width = padded(dim), whole = dim / LANES * LANES;
    if (!x.at) return;
    for (long place = 0; place < count; place++, rows += width) {
        long token = token_of ? token_of[place] : place;
        if (token < 0) continue;
        float *to = token_at(x, batch, head, token);
        for (long d = 0; d < whole; d += LANES) store(to + d, load(rows + d) * factor);
        for (long d = whole; d < dim; d++) to[d] = rows[d] * factor;
    }
}

/* Rows by window -> the same with a column for each token. */
static void columns_by_window(long windows, long places, const float *rows, long dim, long width, float *columns) {
    long wide = padded(places);
    for (long window = 0; window < windows; window++)
        transpose(places, dim, rows + window * places * width, width, columns + window * dim * wide, wide);
}
