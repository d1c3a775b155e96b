/* What queries read of tokens and summaries under one softmax, and the way back; reading.py has the mathematics.

Log-weights have a row for each key or summary that is read, and a column for each query.
*/
#pragma once

#include "work.h"

static void add_read(Work *work, long row, float log_weight) {
    Run *last = work->runs + work->run_count - 1;
    if (work->run_count && last->first + last->count == row) last->count++;
    else work->runs[work->run_count++] = (Run){row, 1};
    work->log_weights[work->read_count++] = log_weight;
}

/* Some places, global tokens, and summaries, where `far` is their log-weights; without it no summaries. */
static void choose_rows(Work *work, long first, long count, const float *far) {
    work->run_count = work->read_count = 0;
    for (long row = first; row < first + count; row++)
        if (is_real(work, row)) add_read(work, row, 0);
    for (long row = work->places; row < work->tokens; row++) add_read(work, row, 0);
    if (!far) return;
    for (long row = work->tokens; row < work->rows; row++) {
        float log_weight = far[row - work->places] + work->mass[row - work->tokens];
        if (log_weight != -INFINITY) add_read(work, row, log_weight);
    }
}

/* Of window `window`: its places; of the one behind the last: global tokens, which read all tokens. Returns how many
queries there are to the last token, `first` the row of the first. */
static long choose_queries(Work *work, long window, long *first) {
    const Call *call = work->call;
    int is_global = window == work->places / call->window;
    long count = is_global ? call->globals : call->window;
    *first = window * call->window;
    if (is_global) choose_rows(work, 0, work->places, NULL);
    else choose_rows(work, *first, count, work->far + window * (work->rows - work->places));
    while (count && !is_real(work, *first + count - 1)) count--;
    return count;
}

/* `work->weights` of `count` queries, unscaled, and what they sum to and are relative to: `[wide]` each. */
static void weigh(Work *work, long first, long count, long wide, float *sum_to, float *relative_to) {
    long dim = work->dim, wide_dim = work->wide_dim, reads = work->read_count;
    float *weights = work->weights;
    transpose(count, dim, work->query + first * wide_dim, wide_dim, work->columns, wide);
    for (long i = 0, at = 0; i < work->run_count; at += work->runs[i++].count) {
        const float *key = work->key + work->runs[i].first * wide_dim;
        product(
            work->runs[i].count, wide, dim, rows_of(key, wide_dim), work->columns, wide, weights + at * wide, wide
        );
    }
    for (long t = 0; t < wide; t += LANES) {
        vec most = all(-INFINITY), sum = {0};
        for (long r = 0; r < reads; r++) {
            vec logit = load(weights + r * wide + t) + work->log_weights[r];
            store(weights + r * wide + t, logit);
            most = larger(most, logit);
        }
        for (long r = 0; r < reads; r++) {
            vec weight = exponential(load(weights + r * wide + t) - most);
            store(weights + r * wide + t, weight);
            sum += weight;
        }
        store(sum_to + t, sum);
        store(relative_to + t, most);
    }
}

static void write_read(Work *work, long window) {
    const Call *call = work->call;
    long first, count = choose_queries(work, window, &first), wide = padded(count), wide_dim = work->wide_dim;
    float sum[wide], most[wide];
    if (!count) return;
    weigh(work, first, count, wide, sum, most);
    memset(work->result, 0, (size_t)(count * wide_dim) * sizeof(float));
    for (long i = 0, at = 0; i < work->run_count; at += work->runs[i++].count)
        add_product(
            count, wide_dim, work->runs[i].count, columns_of(work->weights + at * wide, wide),
            work->value + work->runs[i].first * wide_dim, wide_dim, work->result, wide_dim
        );
    for (long t = 0; t < count; t++) {
        float *row = work->result + t * wide_dim, inverse = 1 / sum[t];
        for (long d = 0; d < wide_dim; d += LANES) store(row + d, load(row + d) * inverse);
        if (is_real(work, first + t)) *number_at(work, call->lse, first + t) = most[t] + logf(sum[t]);
    }
    scatter_tokens(work, first, count, call->output, 1, work->result);
}

/* From weights and what comes from above, those of the logits, in `of_weights`. */
static void softmax_back(Work *work, long first, long count, long wide) {
    Tokens grad_lse = work->call->grad_lse;
    float of_lse[wide];
    for (long t = 0; t < wide; t++)
        of_lse[t] = grad_lse.at && t < count && is_real(work, first + t) ? *number_at(work, grad_lse, first + t) : 0;
    for (long t = 0; t < wide; t += LANES) {
        vec dot = {0}, extra = load(of_lse + t); /* apart: beside a large sum its digits would go */
        for (long r = 0; r < work->read_count; r++)
            dot += load(work->weights + r * wide + t) * load(work->of_weights + r * wide + t);
        for (long r = 0; r < work->read_count; r++) {
            vec weight = load(work->weights + r * wide + t);
            store(work->of_weights + r * wide + t, weight * (load(work->of_weights + r * wide + t) - dot + extra));
        }
    }
}

/* Adds to the gradients of all rows that are read, and of the queries. */
static void read_back(Work *work, long window) {
    long first, count = choose_queries(work, window, &first), wide = padded(count);
    long dim = work->dim, wide_dim = work->wide_dim;
    float sum[wide], most[wide];
    const float *upstream = work->upstream + first * wide_dim, *query = work->query + first * wide_dim;
    if (!count) return;
    weigh(work, first, count, wide, sum, most);
    for (long t = 0; t < wide; t += LANES) {
        vec inverse = 1 / load(sum + t);
        for (long r = 0; r < work->read_count; r++)
            store(work->weights + r * wide + t, load(work->weights + r * wide + t) * inverse);
    }
    transpose(count, dim, upstream, wide_dim, work->upstream_columns, wide);
    for (long i = 0, at = 0; i < work->run_count; at += work->runs[i++].count) {
        Left value = rows_of(work->value + work->runs[i].first * wide_dim, wide_dim);
        product(
            work->runs[i].count, wide, dim, value, work->upstream_columns, wide, work->of_weights + at * wide, wide
        );
    }
    softmax_back(work, first, count, wide);
    for (long i = 0, at = 0; i < work->run_count; at += work->runs[i++].count) {
        long row = work->runs[i].first, rows = work->runs[i].count;
        const float *weights = work->weights + at * wide, *of_logits = work->of_weights + at * wide;
        add_product(
            rows, wide_dim, count, rows_of(weights, wide), upstream, wide_dim, work->of_value + row * wide_dim,
            wide_dim
        );
        add_product(
            rows, wide_dim, count, rows_of(of_logits, wide), query, wide_dim, work->of_key + row * wide_dim, wide_dim
        );
        add_product(
            count, wide_dim, rows, columns_of(of_logits, wide), work->key + row * wide_dim, wide_dim,
            work->of_query + first * wide_dim, wide_dim
        );
        for (long n = row < work->tokens ? work->tokens - row : 0; n < rows; n++) {
            vec total = {0};
            for (long t = 0; t < wide; t += LANES) total += load(of_logits + n * wide + t);
            work->of_mass[row + n - work->tokens] += sum_of(total);
        }
    }
}
