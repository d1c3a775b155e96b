/* What the slots hold of the keys of every window, and of all others. `reading.py` has the mathematics. */
#pragma once

#include "probes.h"

#define LEAST_MASS 2.38e-26f /* e^-59, as in reading.py */
#define LARGEST 512.0f

/* A softmax over the slots of every key's weights. */
static void spread_keys(const Work *work, float *logits, float *spread, const float *slot_bias) {
    long wide = work->wide, slots = work->slots;
    for (long t = 0; t < wide; t += LANES) {
        vec most = all(-INFINITY), sum = {0};
        for (long j = 0; j < slots; j++) {
            vec logit = load(logits + j * wide + t) + (slot_bias ? slot_bias[j] : 0);
            store(logits + j * wide + t, logit);
            most = larger(most, logit);
        }
        for (long j = 0; j < slots; j++) {
            vec weight = exponential(load(logits + j * wide + t) - most);
            store(spread + j * wide + t, weight);
            sum += weight;
        }
        vec log_sum = most;
        for (int i = 0; i < LANES; i++) log_sum[i] += logf(sum[i]);
        vec inverse = 1 / sum;
        for (long j = 0; j < slots; j++) {
            store(spread + j * wide + t, load(spread + j * wide + t) * inverse);
            store(logits + j * wide + t, load(logits + j * wide + t) - log_sum);
        }
    }
}

/* Features of all keys, and their sums by window. Returns whether they have the digits that are needed. */
static int sum_windows(Work *work) {
    const Call *call = work->call;
    long slots = work->slots, wide = work->wide, places = work->places, size = slots * wide;
    const float *maps = slots_of(call->inputs.key_slots, work);
    const float *slot_bias = slots_of(call->inputs.key_slot_bias, work);
    float *largest = work->largest;
    for (long n = 0; n < slots * LANES; n++) largest[n] = -INFINITY;
    for (long window = 0; window < work->windows; window++) {
        float *logits = work->features + window * size;
        const float *columns = work->key_token_columns + window * call->key_dim * wide;
        product(slots, wide, call->key_dim, rows_of(maps, call->inputs.key_slots.slot), columns, wide, logits, wide);
        if (call->spreads) spread_keys(work, logits, work->spread + window * size, slot_bias);
        const float *bias = work->key_bias + window * wide;
        for (long j = 0; j < slots; j++)
            for (long t = 0; t < wide; t += LANES) {
                vec logit = load(logits + j * wide + t) + load(bias + t);
                store(logits + j * wide + t, logit);
                store(largest + j * LANES, larger(load(largest + j * LANES), logit));
            }
    }
    for (long j = 0; j < slots; j++) {
        float most = largest_of(load(largest + j * LANES));
        if (most == -INFINITY) most = 0;
        if (!(fabsf(most) <= LARGEST)) return 0;
        work->reference[j] = most;
    }
    for (long window = 0; window < work->windows; window++) {
        float *features = work->features + window * size, *mass = work->mass + window * slots;
        for (long j = 0; j < slots; j++) {
            vec sum = {0};
            for (long t = 0; t < wide; t += LANES) {
                vec weight = exponential(load(features + j * wide + t) - work->reference[j]);
                store(features + j * wide + t, weight);
                sum += weight;
            }
            mass[j] = sum_of(sum);
        }
        product(
            slots, work->value_dim, places, rows_of(features, wide), work->value + window * places * work->value_dim,
            work->value_dim, work->sums + window * slots * work->value_dim, work->value_dim
        );
    }
    return 1;
}

/* behind[i] = sum of parts[k] over k > i. */
static void sum_behind(const float *parts, long windows, long size, float *behind) {
    memset(behind + (windows - 1) * size, 0, (size_t)size * sizeof(float));
    for (long i = windows - 2; i >= 0; i--)
        for (long n = 0; n < size; n++) behind[i * size + n] = behind[(i + 1) * size + n] + parts[(i + 1) * size + n];
}

/* Log-masses of what every window sees of the others, and their inverse. Returns as `sum_windows`. */
static int weigh_others(Work *work) {
    const Call *call = work->call;
    long slots = work->slots, windows = work->windows, real = 0;
    const float *query_slot_bias = slots_of(call->inputs.query_slot_bias, work);
    const float *key_slot_bias = call->spreads ? NULL : slots_of(call->inputs.key_slot_bias, work);
    for (long place = 0; place < work->count; place++) real += is_real(work, place);
    float before[slots], shift = (float)call->shift;
    memset(before, 0, sizeof before);
    sum_behind(work->mass, windows, slots, work->inverse_mass);
    for (long window = 0; window < windows; window++) {
        float *mass = work->mass + window * slots, *found = work->inverse_mass + window * slots;
        float *log_mass = work->log_mass + window * slots;
        long own = 0;
        for (long t = 0; t < work->places; t++) own += is_real(work, window * work->places + t);
        for (long j = 0; j < slots; j++) {
            float others = before[j] + found[j];
            before[j] += mass[j];
            if (own == real) { /* there are no others */
                found[j] = 0;
                log_mass[j] = -INFINITY;
                continue;
            }
            if (!(others >= LEAST_MASS)) return 0;
            found[j] = 1 / others;
            log_mass[j] = logf(others) + work->reference[j] + shift;
            if (query_slot_bias) log_mass[j] += query_slot_bias[j];
            if (key_slot_bias) log_mass[j] += key_slot_bias[j];
        }
    }
    if (call->probes) {
        float extra = mass_shift(work, before, query_slot_bias) - shift;
        for (long n = 0; n < windows * slots; n++) work->log_mass[n] += extra;
    }
    return 1;
}

/* Everything of a row and head that is no window's own. Returns whether float32 has the digits that are needed. */
static int read_row(Work *work) {
    const Call *call = work->call;
    const Inputs *inputs = &call->inputs;
    float root = (float)call->root;
    gather_tokens(work, inputs->query, call->dim, root, work->query);
    gather_tokens(work, inputs->key, call->dim, root, work->key);
    gather_tokens(work, inputs->value, call->value_dim, 1, work->value);
    columns_by_window(work->windows, work->places, work->query, call->dim, work->dim, work->query_columns);
    if (work->own_query) {
        gather_tokens(work, inputs->query_tokens, call->query_dim, root, work->query_tokens);
        columns_by_window(work->windows, work->places, work->query_tokens, call->query_dim, work->query_dim, work->query_token_columns);
    }
    if (work->own_key) gather_tokens(work, inputs->key_tokens, call->key_dim, root, work->key_tokens);
    columns_by_window(work->windows, work->places, work->key_tokens, call->key_dim, work->key_dim, work->key_token_columns);
    token_bias(
        work, inputs->query_bias, (float)call->query_norm, work->query_token_columns, call->query_dim, 0,
        work->query_bias
    );
    token_bias(
        work, inputs->key_bias, (float)call->key_norm, work->key_token_columns, call->key_dim, -INFINITY,
        work->key_bias
    );
    for (long n = 0; n < work->windows * work->wide; n++) {
        work->is_hidden[n] = work->key_bias[n] == -INFINITY;
        if (!(fabsf(work->query_bias[n]) <= LARGEST)) return 0;
    }
    return sum_windows(work) && weigh_others(work);
}
