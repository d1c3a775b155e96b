/* What the queries of a window read from its keys and, through slots, from all others. */
#pragma once

#include "sums.h"

/* `work->weights` of a window, unscaled, and what they sum to and are relative to: `[wide]` each. */
static void weigh_window(Work *work, long window, float *sum_to, float *relative_to) {
    const Call *call = work->call;
    long places = work->places, wide = work->wide, slots = work->slots;
    float *near = work->weights, *far = near + places * wide;
    const float *key = work->key + window * places * work->dim;
    const float *maps = slots_of(call->inputs.query_slots, work);
    const float *columns = work->query_columns + window * call->dim * wide;
    const float *token_columns = work->query_token_columns + window * call->query_dim * wide;
    const float *bias = work->log_mass + window * slots, *query_bias = work->query_bias + window * wide;
    const float *is_hidden = work->is_hidden + window * wide;
    product(places, wide, call->dim, rows_of(key, work->dim), columns, wide, near, wide);
    product(
        slots, wide, call->query_dim, rows_of(maps, call->inputs.query_slots.slot), token_columns, wide, far, wide
    );
    for (long t = 0; t < wide; t += LANES) {
        vec most = all(-INFINITY), sum = {0}, of_query = load(query_bias + t);
        for (long s = 0; s < places; s++) {
            if (is_hidden[s]) store(near + s * wide + t, all(-INFINITY));
            most = larger(most, load(near + s * wide + t));
        }
        for (long j = 0; j < slots; j++) {
            vec logit = load(far + j * wide + t) + of_query + bias[j];
            store(far + j * wide + t, logit);
            most = larger(most, logit);
        }
        store(relative_to + t, most);
        for (int i = 0; i < LANES; i++)
            if (most[i] == -INFINITY) most[i] = 0; /* nothing to see */
        for (long s = 0; s < places + slots; s++) {
            vec weight = exponential(load(near + s * wide + t) - most);
            store(near + s * wide + t, weight);
            sum += weight;
        }
        store(sum_to + t, sum);
    }
}

/* Of all other windows, `[slots][value_dim]`: `work->behind` are the sums of later ones. Window after window. */
static const float *sum_others(const Work *work, const float *sums, long window) {
    long size = work->slots * work->value_dim;
    if (window == 0) memset(work->before, 0, (size_t)size * sizeof(float));
    for (long n = 0; n < size; n++) {
        work->others[n] = work->before[n] + work->behind[window * size + n];
        work->before[n] += sums[window * size + n];
    }
    return work->others;
}

static void write_window(Work *work, long window) {
    const Call *call = work->call;
    long places = work->places, wide = work->wide, slots = work->slots, width = work->value_dim;
    float sum[wide], most[wide], *near = work->weights, *far = near + places * wide;
    const float *inverse_mass = work->inverse_mass + window * slots;
    weigh_window(work, window, sum, most);
    for (long j = 0; j < slots; j++)
        for (long t = 0; t < wide; t += LANES)
            store(far + j * wide + t, load(far + j * wide + t) * inverse_mass[j]);
    const float *others = sum_others(work, work->sums, window);
    const float *value = work->value + window * places * width;
    product(places, width, places, columns_of(near, wide), value, width, work->result, width);
    add_product(places, width, slots, columns_of(far, wide), others, width, work->result, width);
    for (long t = 0; t < places; t++) {
        float inverse = sum[t] == 0 ? 0 : 1 / sum[t];
        for (long d = 0; d < width; d += LANES)
            store(work->result + t * width + d, load(work->result + t * width + d) * inverse);
    }
    scatter_window(work, window, call->output, call->value_dim, 1, work->result);
    if (!call->lse.at) return;
    for (long t = 0; t < places; t++) {
        long token = call->token_of[window * places + t];
        if (token >= 0) *token_at(call->lse, work->batch, work->head, token) = sum[t] == 0 ? -INFINITY : most[t] + logf(sum[t]);
    }
}
