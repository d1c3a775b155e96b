/* How much more or less mass the slots have than the keys themselves, as some queries find it: see `probes.py`. */
#pragma once

#include "call.h"

/* Of every column of `logits + of_rows` the log-sum-exp. */
static void log_sums(long rows, long wide, float *logits, const float *of_rows, float *found) {
    for (long p = 0; p < wide; p += LANES) {
        vec most = all(-INFINITY), sum = {0};
        for (long n = 0; n < rows; n++) {
            vec logit = load(logits + n * wide + p) + of_rows[n];
            store(logits + n * wide + p, logit);
            most = larger(most, logit);
        }
        for (long n = 0; n < rows; n++) sum += exponential(load(logits + n * wide + p) - most);
        for (int i = 0; i < LANES; i++) most[i] += logf(sum[i]);
        store(found + p, most);
    }
}

/* Of every probe, the log-sum-exp of its products with `left`, and of what that adds to a row. */
static void probe(
    const Work *work, const float *tokens, long dim, long width, long rows, Left left, const float *of_rows,
    float *found
) {
    const Call *call = work->call;
    long probes = call->probes, wide = padded(probes);
    float *own = work->weights, *columns = own + probes * width, *logits = columns + width * wide;
    for (long p = 0; p < probes; p++)
        memcpy(own + p * width, tokens + call->probe[p] * width, (size_t)width * sizeof(float));
    transpose(probes, dim, own, width, columns, wide);
    product(rows, wide, dim, left, columns, wide, logits, wide);
    log_sums(rows, wide, logits, of_rows, found);
}

/* Mean over probes of the log-sum-exp over all keys less that through slots. total: `[slots]`, mass of all keys. */
static float mass_shift(const Work *work, const float *total, const float *query_slot_bias) {
    const Call *call = work->call;
    long wide = padded(call->probes), slots = work->slots;
    float of_keys[work->count], of_slots[slots], exact[wide], through_slots[wide], mean = 0;
    for (long n = 0; n < work->count; n++) of_keys[n] = is_real(work, n) ? 0 : -INFINITY;
    for (long j = 0; j < slots; j++)
        of_slots[j] = logf(total[j]) + work->reference[j] + (query_slot_bias ? query_slot_bias[j] : 0);
    probe(
        work, work->query, call->dim, work->dim, work->count, rows_of(work->key, work->dim), of_keys, exact
    );
    Left maps = rows_of(slots_of(call->inputs.query_slots, work), call->inputs.query_slots.slot);
    probe(work, work->query_tokens, call->query_dim, work->query_dim, slots, maps, of_slots, through_slots);
    for (long p = 0; p < call->probes; p++)
        mean += exact[p] - through_slots[p] - work->query_bias[column_of(work, call->probe[p])];
    return mean / (float)call->probes;
}
