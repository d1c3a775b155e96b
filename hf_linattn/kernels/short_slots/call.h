/* One call of attention through windows and slots, and the memory of one row and head of it.

Log-weights have a row for each key or slot and a column for each query; those of keys the other way round.
*/
#pragma once

#include "tokens.h"

/* As in inputs.py: what goes in, and its gradients. */
typedef struct {
    Tokens query, key, value, query_tokens, key_tokens, query_bias, key_bias;
    Slots query_slots, query_slot_bias, key_slots, key_slot_bias;
} Inputs;

/* slot_rows: Rows with slots of their own; the batch is as many groups. token_of: `[windows * places]`, -1 for none. */
typedef struct {
    long batch, heads, slot_rows, places, windows, slots, dim, value_dim, query_dim, key_dim, spreads, probes;
    double root, query_norm, key_norm, shift;
    const int64_t *token_of, *probe;
    Tokens output, lse;
    Inputs inputs;
    Tokens grad_output, grad_lse;
    Inputs grads;
} Call;

typedef struct {
    const Call *call;
    long places, slots, windows, count;               /* count: of all places */
    long wide, dim, value_dim, query_dim, key_dim;    /* of whole vectors; wide: a window */
    int own_query, own_key;                           /* maps are applied to other tokens than query and key */
    long batch, head;
    /* Row by row: tokens, scaled. */
    float *query, *key, *value, *query_tokens, *key_tokens, *upstream;
    /* The same with a column for each token, window by window. */
    float *query_columns, *query_token_columns, *key_token_columns, *value_columns, *upstream_columns;
    float *query_bias, *key_bias, *is_hidden;         /* by window, `wide` numbers */
    float *features, *spread;                         /* [windows][slots][wide] */
    float *largest;                                   /* [slots][LANES] */
    float *reference, *mass, *inverse_mass, *log_mass; /* [slots], [windows][slots] each */
    float *sums, *behind;                             /* [windows][slots][value_dim], of later windows */
    float *before, *others;                           /* [slots][value_dim]: of earlier windows, of all others */
    float *weights, *of_weights, *result;             /* [places + slots][wide], the same, [places][largest dim] */
    float *of_others, *of_mass;                       /* like sums and mass: gradients */
    float *of_key, *of_value;                         /* [count][dim] */
    float *query_maps, *key_maps;                     /* [slots][dim] */
    float *of_query_slots, *of_key_slots, *of_slot_bias, *of_key_slot_bias;
} Work;

static void plan(Work *work, const Call *call, Memory *memory, int is_backward) {
    long slots = call->slots, windows = call->windows, places = call->places, count = windows * places;
    long wide = padded(places), dim = padded(call->dim), value_dim = padded(call->value_dim);
    long query_dim = padded(call->query_dim), key_dim = padded(call->key_dim);
    long widest = dim > query_dim ? dim : query_dim;
    widest = widest > value_dim ? widest : value_dim;
    widest = widest > key_dim ? widest : key_dim;
    long across = call->windows * wide;
    int own_query = call->inputs.query_tokens.at != NULL, own_key = call->inputs.key_tokens.at != NULL;
    *work = (Work){
        .call = call, .places = places, .slots = slots, .windows = windows, .count = count, .wide = wide, .dim = dim,
        .value_dim = value_dim, .query_dim = query_dim, .key_dim = key_dim, .own_query = own_query,
        .own_key = own_key,
    };
    work->query = part_of(memory, count * dim);
    work->key = part_of(memory, count * dim);
    work->value = part_of(memory, count * value_dim);
    work->query_columns = part_of(memory, across * dim);
    work->key_token_columns = part_of(memory, across * key_dim);
    work->query_tokens = own_query ? part_of(memory, count * query_dim) : work->query;
    work->query_token_columns = own_query ? part_of(memory, across * query_dim) : work->query_columns;
    work->key_tokens = own_key ? part_of(memory, count * key_dim) : work->key;
    work->query_bias = part_of(memory, across);
    work->key_bias = part_of(memory, across);
    work->is_hidden = part_of(memory, across);
    work->features = part_of(memory, slots * across);
    work->spread = call->spreads ? part_of(memory, slots * across) : NULL;
    work->largest = part_of(memory, slots * LANES);
    work->reference = part_of(memory, slots);
    work->mass = part_of(memory, windows * slots);
    work->inverse_mass = part_of(memory, windows * slots);
    work->log_mass = part_of(memory, windows * slots);
    work->sums = part_of(memory, windows * slots * value_dim);
    work->behind = part_of(memory, windows * slots * value_dim);
    work->before = part_of(memory, slots * value_dim);
    work->others = part_of(memory, slots * value_dim);
    long probes = padded(call->probes);
    long rows = places + slots > count ? places + slots : count;
    long of_probes = probes * (rows + 2 * widest);
    long of_window = (places + slots) * wide;
    work->weights = part_of(memory, of_window > of_probes ? of_window : of_probes);
    work->result = part_of(memory, places * widest);
    if (!is_backward) return;
    work->upstream = part_of(memory, count * value_dim);
    work->upstream_columns = part_of(memory, wide * value_dim);
    work->value_columns = part_of(memory, wide * value_dim);
    work->of_weights = part_of(memory, (places + slots) * wide);
    work->of_others = part_of(memory, windows * slots * value_dim);
    work->of_mass = part_of(memory, windows * slots);
    work->of_key = part_of(memory, count * dim);
    work->of_value = part_of(memory, count * value_dim);
    work->query_maps = part_of(memory, slots * query_dim);
    work->key_maps = part_of(memory, slots * key_dim);
    work->of_query_slots = part_of(memory, slots * query_dim);
    work->of_key_slots = part_of(memory, slots * key_dim);
    work->of_slot_bias = part_of(memory, slots);
    work->of_key_slot_bias = part_of(memory, slots);
}

static Memory memory_for(const Call *call, int is_backward) {
    Work work;
    Memory counted = {NULL, NULL};
    plan(&work, call, &counted, is_backward);
    return take_memory(counted.next - (float *)NULL);
}

/* -- tokens ------------------------------------------------------------------------------------------------------- */
INLINE void gather_tokens(const Work *work, Tokens x, long dim, float factor, float *rows) {
    gather(work->call->token_of, work->count, x, work->batch, work->head, dim, factor, rows);
}

INLINE void scatter_window(const Work *work, long window, Tokens x, long dim, float factor, const float *rows) {
    const int64_t *token_of = work->call->token_of + window * work->places;
    scatter(token_of, work->places, x, work->batch, work->head, dim, factor, rows);
}

/* Of every place: `bias - norm |token|^2 / 2`; `absent` for places without a token. */
static void token_bias(
    const Work *work, Tokens bias, float norm, const float *columns, long dim, float absent, float *found
) {
    long places = work->places, wide = work->wide;
    for (long window = 0; window < work->windows; window++, found += wide, columns += dim * wide) {
        for (long t = 0; t < wide; t++) {
            long token = t < places ? work->call->token_of[window * places + t] : -1;
            found[t] = token < 0 ? absent : bias.at ? *token_at(bias, work->batch, work->head, token) : 0;
        }
        if (!norm) continue;
        for (long t = 0; t < wide; t += LANES) {
            vec squares = {0};
            for (long d = 0; d < dim; d++) squares += load(columns + d * wide + t) * load(columns + d * wide + t);
            store(found + t, load(found + t) - squares * (norm / 2));
        }
    }
}

static const float *slots_of(Slots x, const Work *work) {
    long row = work->batch / (work->call->batch / work->call->slot_rows);
    return x.at ? x.at + row * x.batch + work->head * x.head : NULL;
}

/* Where arrays by window, of `wide` numbers each, have a place. */
INLINE long column_of(const Work *work, long place) {
    return place / work->places * work->wide + place % work->places;
}

INLINE int is_real(const Work *work, long place) { return !work->is_hidden[column_of(work, place)]; }
