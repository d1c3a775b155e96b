/* Gradients: through what a window reads, and through what the slots hold of it. */
#pragma once

#include "windows.h"

/* From weights and what comes from above, those of the logits, in `of_weights`. */
static void softmax_back(Work *work, long window) {
    long places = work->places, wide = work->wide, count = places + work->slots;
    const float *grad_lse = NULL;
    float of_lse[wide];
    if (work->call->grad_lse.at) {
        for (long t = 0; t < wide; t++) {
            long token = t < places ? work->call->token_of[window * places + t] : -1;
            of_lse[t] = token < 0 ? 0 : *token_at(work->call->grad_lse, work->batch, work->head, token);
        }
        grad_lse = of_lse;
    }
    for (long t = 0; t < wide; t += LANES) {
        vec dot = {0};
        for (long s = 0; s < count; s++) dot += load(work->weights + s * wide + t) * load(work->of_weights + s * wide + t);
        if (grad_lse) dot -= load(grad_lse + t);
        for (long s = 0; s < count; s++) {
            vec weight = load(work->weights + s * wide + t);
            store(work->of_weights + s * wide + t, weight * (load(work->of_weights + s * wide + t) - dot));
        }
    }
}

/* Adds `-norm` times the gradient of a token's bias and the token, and writes the gradient of the bias. */
static void bias_back(
    const Work *work, long window, const float *of_bias, float norm, const float *tokens, long dim, float *of_tokens,
    Tokens to
) {
    for (long t = 0; t < work->places; t++) {
        float factor = -norm * of_bias[t];
        if (norm)
            for (long d = 0; d < dim; d += LANES)
                store(of_tokens + t * dim + d, load(of_tokens + t * dim + d) + load(tokens + t * dim + d) * factor);
        long token = work->call->token_of[window * work->places + t];
        if (to.at && token >= 0) *token_at(to, work->batch, work->head, token) = of_bias[t];
    }
}

/* Sums over slots, `[wide]`. */
static void sum_slots(const Work *work, const float *of_logits, float *sums) {
    for (long t = 0; t < work->wide; t += LANES) {
        vec sum = {0};
        for (long j = 0; j < work->slots; j++) sum += load(of_logits + j * work->wide + t);
        store(sums + t, sum);
    }
}

static void add_sums(const Work *work, const float *of_logits, float *to) {
    for (long j = 0; j < work->slots; j++) {
        vec sum = {0};
        for (long t = 0; t < work->wide; t += LANES) sum += load(of_logits + j * work->wide + t);
        to[j] += sum_of(sum);
    }
}

/* Through what a window reads: gradients of its queries, and parts of those of its keys, values and slots. */
static void window_back(Work *work, long window) {
    const Call *call = work->call;
    const Inputs *grads = &call->grads;
    long places = work->places, wide = work->wide, slots = work->slots, width = work->value_dim;
    long dim = work->dim, query_dim = work->query_dim, start = window * places;
    float *near = work->weights, *far = near + places * wide;
    float *of_near = work->of_weights, *of_far = of_near + places * wide;
    float root = (float)call->root, sum[wide], most[wide];
    weigh_window(work, window, sum, most);
    for (long t = 0; t < wide; t += LANES) {
        vec inverse;
        for (int i = 0; i < LANES; i++) inverse[i] = sum[t + i] == 0 ? 0 : 1 / sum[t + i];
        for (long s = 0; s < places + slots; s++) store(near + s * wide + t, load(near + s * wide + t) * inverse);
    }
    const float *others = sum_others(work, work->sums, window);
    const float *inverse_mass = work->inverse_mass + window * slots;
    const float *upstream = work->upstream + start * width;
    transpose(places, call->value_dim, upstream, width, work->upstream_columns, wide);
    product(
        places, wide, call->value_dim, rows_of(work->value + start * width, width), work->upstream_columns, wide,
        of_near, wide
    );
    product(slots, wide, call->value_dim, rows_of(others, width), work->upstream_columns, wide, of_far, wide);
    for (long j = 0; j < slots; j++)
        for (long t = 0; t < wide; t += LANES)
            store(of_far + j * wide + t, load(of_far + j * wide + t) * inverse_mass[j]);
    softmax_back(work, window);

    product(places, width, places, rows_of(near, wide), upstream, width, work->of_value + start * width, width);
    float *of_others = work->of_others + window * slots * width, *of_mass = work->of_mass + window * slots;
    float of_slot_bias[slots];
    memset(of_slot_bias, 0, sizeof of_slot_bias);
    add_sums(work, of_far, of_slot_bias);
    product(slots, width, places, rows_of(far, wide), upstream, width, of_others, width);
    for (long j = 0; j < slots; j++) {
        vec dot = {0};
        for (long d = 0; d < width; d += LANES) {
            vec own = load(of_others + j * width + d) * inverse_mass[j];
            dot += own * load(others + j * width + d);
            store(of_others + j * width + d, own);
        }
        of_mass[j] = inverse_mass[j] * (of_slot_bias[j] - sum_of(dot));
        work->of_slot_bias[j] += of_slot_bias[j];
    }

    product(
        places, dim, places, columns_of(of_near, wide), work->key + start * dim, dim, work->result, dim
    );
    product(
        places, dim, places, rows_of(of_near, wide), work->query + start * dim, dim, work->of_key + start * dim, dim
    );
    float of_bias[wide];
    sum_slots(work, of_far, of_bias);
    Left columns = columns_of(of_far, wide);
    const float *tokens = work->query_tokens + start * query_dim;
    if (work->own_query) {
        scatter_window(work, window, grads->query, call->dim, root, work->result);
        product(places, query_dim, slots, columns, work->query_maps, query_dim, work->result, query_dim);
    } else {
        add_product(places, query_dim, slots, columns, work->query_maps, query_dim, work->result, query_dim);
    }
    bias_back(
        work, window, of_bias, (float)call->query_norm, tokens, query_dim, work->result, grads->query_bias
    );
    scatter_window(
        work, window, work->own_query ? grads->query_tokens : grads->query, call->query_dim, root, work->result
    );
    if (!grads->query_slots.at) return;
    add_product(slots, query_dim, places, rows_of(of_far, wide), tokens, query_dim, work->of_query_slots, query_dim);
}

/* Through what the slots hold of a window: the rest of the gradients of its keys and values. */
static void features_back(Work *work, long window, const float *of_sums, const float *of_mass) {
    const Call *call = work->call;
    const Inputs *grads = &call->grads;
    long places = work->places, wide = work->wide, slots = work->slots, width = work->value_dim;
    long dim = work->dim, key_dim = work->key_dim, start = window * places;
    float *features = work->features + window * slots * wide, *of_logits = work->of_weights, of_bias[wide];
    float root = (float)call->root;
    transpose(places, call->value_dim, work->value + start * width, width, work->value_columns, wide);
    product(slots, wide, call->value_dim, rows_of(of_sums, width), work->value_columns, wide, of_logits, wide);
    add_product(
        places, width, slots, columns_of(features, wide), of_sums, width, work->of_value + start * width, width
    );
    for (long j = 0; j < slots; j++)
        for (long t = 0; t < wide; t += LANES)
            store(
                of_logits + j * wide + t,
                (load(of_logits + j * wide + t) + of_mass[j]) * load(features + j * wide + t)
            );
    sum_slots(work, of_logits, of_bias);
    if (call->spreads) {
        const float *spread = work->spread + window * slots * wide;
        for (long j = 0; j < slots; j++)
            for (long t = 0; t < wide; t += LANES)
                store(
                    of_logits + j * wide + t,
                    load(of_logits + j * wide + t) - load(spread + j * wide + t) * load(of_bias + t)
                );
        add_sums(work, of_logits, work->of_key_slot_bias);
    }
    const float *tokens = work->key_tokens + start * key_dim;
    float *of_tokens = work->own_key ? work->result : work->of_key + start * dim;
    Left columns = columns_of(of_logits, wide);
    if (work->own_key) product(places, key_dim, slots, columns, work->key_maps, key_dim, of_tokens, key_dim);
    else add_product(places, key_dim, slots, columns, work->key_maps, key_dim, of_tokens, key_dim);
    bias_back(work, window, of_bias, (float)call->key_norm, tokens, key_dim, of_tokens, grads->key_bias);
    if (work->own_key) scatter_window(work, window, grads->key_tokens, call->key_dim, root, of_tokens);
    scatter_window(work, window, grads->key, call->dim, root, work->of_key + start * dim);
    scatter_window(work, window, grads->value, call->value_dim, 1, work->of_value + start * width);
    if (!grads->key_slots.at) return;
    add_product(slots, key_dim, places, rows_of(of_logits, wide), tokens, key_dim, work->of_key_slots, key_dim);
}
