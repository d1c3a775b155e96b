/* Attention of short inputs through windows and slots, one row and head after another; `reading.py` says what it is.

Places are the tokens of all windows, one window after the other; some have no token (behind the end of a row, or of an
image). Log-weights have a row for each key or slot and a column for each query; those of keys the other way round.
*/
#include "arithmetic.h"

#define LEAST_MASS 2.38e-26f /* e^-59, as in reading.py */
#define LARGEST 512.0f

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
    float *reference, *mass, *inverse_mass, *log_mass; /* [slots], [windows][slots] each */
    float *sums, *behind;                             /* [windows][slots][value_dim], of later windows */
    float *before, *others;                           /* [slots][value_dim]: of earlier windows, of all others */
    float *weights, *of_weights, *result;             /* [places + slots][wide], the same, [places][largest dim] */
    float *of_others, *of_mass;                       /* like sums and mass: gradients */
    float *of_key, *of_value;                         /* [count][dim] */
    float *query_maps, *key_maps;                     /* [slots][dim] */
    float *of_query_slots, *of_key_slots, *of_slot_bias, *of_key_slot_bias;
} Work;

/* -- memory -------------------------------------------------------------------------------------------------------- */
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
    long of_probes = probes * (rows + slots + widest);
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

/* -- tokens -------------------------------------------------------------------------------------------------------- */
INLINE float *token_at(Tokens x, const Work *work, long token) {
    return x.at + work->batch * x.batch + work->head * x.head + token * x.token;
}

/* Rows of whole vectors, times `factor`; zeros for places without a token. */
static void gather(const Work *work, Tokens x, long dim, float factor, float *rows) {
    long width = padded(dim), whole = dim / LANES * LANES;
    for (long place = 0; place < work->count; place++, rows += width) {
        long token = work->call->token_of[place];
        if (token < 0) {
            memset(rows, 0, (size_t)width * sizeof(float));
            continue;
        }
        const float *from = token_at(x, work, token);
        for (long d = 0; d < whole; d += LANES) store(rows + d, load(from + d) * factor);
        for (long d = whole; d < width; d++) rows[d] = d < dim ? from[d] * factor : 0;
    }
}

/* Of one window, to the tokens of its places, times `factor`. */
static void scatter(const Work *work, long window, Tokens x, long dim, float factor, const float *rows) {
    long width = padded(dim), whole = dim / LANES * LANES;
    if (!x.at) return;
    for (long place = 0; place < work->places; place++, rows += width) {
        long token = work->call->token_of[window * work->places + place];
        if (token < 0) continue;
        float *to = token_at(x, work, token);
        for (long d = 0; d < whole; d += LANES) store(to + d, load(rows + d) * factor);
        for (long d = whole; d < dim; d++) to[d] = rows[d] * factor;
    }
}

static void columns_by_window(const Work *work, const float *rows, long dim, long width, float *columns) {
    for (long window = 0; window < work->windows; window++)
        transpose(
            work->places, dim, rows + window * work->places * width, width, columns + window * dim * work->wide,
            work->wide
        );
}

/* Of every place: `bias - norm |token|^2 / 2`; `absent` for places without a token. */
static void token_bias(
    const Work *work, Tokens bias, float norm, const float *columns, long dim, float absent, float *found
) {
    long places = work->places, wide = work->wide;
    for (long window = 0; window < work->windows; window++, found += wide, columns += dim * wide) {
        for (long t = 0; t < wide; t++) {
            long token = t < places ? work->call->token_of[window * places + t] : -1;
            found[t] = token < 0 ? absent : bias.at ? *token_at(bias, work, token) : 0;
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

/* -- what the slots hold ------------------------------------------------------------------------------------------- */
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
    vec largest[slots];
    for (long j = 0; j < slots; j++) largest[j] = all(-INFINITY);
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
                largest[j] = larger(largest[j], logit);
            }
    }
    for (long j = 0; j < slots; j++) {
        float most = largest_of(largest[j]);
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

static int is_real(const Work *work, long place) {
    return !work->is_hidden[place / work->places * work->wide + place % work->places];
}

/* Mean over probes of the log-sum-exp over all keys less that through slots; see probes.py. */
static float mass_shift(const Work *work, const float *total, const float *query_slot_bias) {
    const Call *call = work->call;
    long probes = call->probes, wide = padded(probes), slots = work->slots;
    float *columns = work->weights, *bias = columns + wide * (work->dim > work->query_dim ? work->dim : work->query_dim);
    float *logits = bias + wide;
    vec exact[wide / LANES];
    float mean = 0;
    for (int through_slots = 0; through_slots < 2; through_slots++) {
        const float *rows = through_slots ? work->query_tokens : work->query;
        long dim = through_slots ? call->query_dim : call->dim, width = through_slots ? work->query_dim : work->dim;
        for (long d = 0; d < dim; d++)
            for (long p = 0; p < wide; p++)
                columns[d * wide + p] = p < probes ? rows[call->probe[p] * width + d] : 0;
        for (long p = 0; p < wide; p++) {
            long place = p < probes ? call->probe[p] : 0;
            bias[p] = through_slots ? work->query_bias[place / work->places * work->wide + place % work->places] : 0;
        }
        long count = through_slots ? slots : work->count;
        const float *left = through_slots ? slots_of(call->inputs.query_slots, work) : work->key;
        Left a = rows_of(left, through_slots ? call->inputs.query_slots.slot : work->dim);
        product(count, wide, dim, a, columns, wide, logits, wide);
        for (long p = 0; p < wide; p += LANES) {
            vec most = all(-INFINITY), sum = {0};
            for (long n = 0; n < count; n++) {
                vec logit = load(logits + n * wide + p) + load(bias + p);
                if (through_slots)
                    logit += logf(total[n]) + work->reference[n] + (query_slot_bias ? query_slot_bias[n] : 0);
                else if (!is_real(work, n))
                    logit = all(-INFINITY);
                store(logits + n * wide + p, logit);
                most = larger(most, logit);
            }
            for (long n = 0; n < count; n++) sum += exponential(load(logits + n * wide + p) - most);
            for (int i = 0; i < LANES; i++) most[i] += logf(sum[i]);
            if (!through_slots) exact[p / LANES] = most;
            else
                for (int i = 0; i < LANES && p + i < probes; i++) mean += exact[p / LANES][i] - most[i];
        }
    }
    return mean / (float)probes;
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
    gather(work, inputs->query, call->dim, root, work->query);
    gather(work, inputs->key, call->dim, root, work->key);
    gather(work, inputs->value, call->value_dim, 1, work->value);
    columns_by_window(work, work->query, call->dim, work->dim, work->query_columns);
    if (work->own_query) {
        gather(work, inputs->query_tokens, call->query_dim, root, work->query_tokens);
        columns_by_window(work, work->query_tokens, call->query_dim, work->query_dim, work->query_token_columns);
    }
    if (work->own_key) gather(work, inputs->key_tokens, call->key_dim, root, work->key_tokens);
    columns_by_window(work, work->key_tokens, call->key_dim, work->key_dim, work->key_token_columns);
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

/* -- what a window reads ------------------------------------------------------------------------------------------- */
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
    scatter(work, window, call->output, call->value_dim, 1, work->result);
    if (!call->lse.at) return;
    for (long t = 0; t < places; t++) {
        long token = call->token_of[window * places + t];
        if (token >= 0) *token_at(call->lse, work, token) = sum[t] == 0 ? -INFINITY : most[t] + logf(sum[t]);
    }
}

/* Pairs of a row and a head, numbered so that neighbours have the same slots. */
static void choose_pair(Work *work, long group, long row) {
    long together = work->call->batch / work->call->slot_rows;
    work->batch = group / work->call->heads * together + row;
    work->head = group % work->call->heads;
}

/* Output and log-sum-exp of the pairs from `first` to before `last`. 0 if done; 1: float64 is needed; 2: no memory. */
int short_forward(const Call *call, long first, long last) {
    long together = call->batch / call->slot_rows;
    Memory memory = memory_for(call, 0);
    if (!memory.next) return 2;
    Memory rest = memory;
    Work work;
    plan(&work, call, &rest, 0);
    long size = work.slots * work.value_dim;
    int is_safe = 1;
    for (long pair = first; pair < last && is_safe; pair++) {
        choose_pair(&work, pair / together, pair % together);
        is_safe = read_row(&work);
        if (!is_safe) break;
        sum_behind(work.sums, work.windows, size, work.behind);
        for (long window = 0; window < work.windows; window++) write_window(&work, window);
    }
    give_memory_back(memory);
    return !is_safe;
}

/* -- gradients ----------------------------------------------------------------------------------------------------- */
/* From weights and what comes from above, those of the logits, in `of_weights`. */
static void softmax_back(Work *work, long window) {
    long places = work->places, wide = work->wide, count = places + work->slots;
    const float *grad_lse = NULL;
    float of_lse[wide];
    if (work->call->grad_lse.at) {
        for (long t = 0; t < wide; t++) {
            long token = t < places ? work->call->token_of[window * places + t] : -1;
            of_lse[t] = token < 0 ? 0 : *token_at(work->call->grad_lse, work, token);
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
        if (to.at && token >= 0) *token_at(to, work, token) = of_bias[t];
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
        scatter(work, window, grads->query, call->dim, root, work->result);
        product(places, query_dim, slots, columns, work->query_maps, query_dim, work->result, query_dim);
    } else {
        add_product(places, query_dim, slots, columns, work->query_maps, query_dim, work->result, query_dim);
    }
    bias_back(
        work, window, of_bias, (float)call->query_norm, tokens, query_dim, work->result, grads->query_bias
    );
    scatter(
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
    if (work->own_key) scatter(work, window, grads->key_tokens, call->key_dim, root, of_tokens);
    scatter(work, window, grads->key, call->dim, root, work->of_key + start * dim);
    scatter(work, window, grads->value, call->value_dim, 1, work->of_value + start * width);
    if (!grads->key_slots.at) return;
    add_product(slots, key_dim, places, rows_of(of_logits, wide), tokens, key_dim, work->of_key_slots, key_dim);
}

/* Rows of whole vectors. */
static void gather_slots(const Work *work, Slots x, long dim, float *rows) {
    const float *from = slots_of(x, work);
    for (long j = 0; j < work->slots; j++)
        for (long d = 0; d < padded(dim); d++) *rows++ = d < dim ? from[j * x.slot + d] : 0;
}

static void write_slots(const Work *work, Slots to, const float *from, long dim, long width) {
    float *at = (float *)slots_of(to, work);
    if (!at) return;
    for (long j = 0; j < work->slots; j++)
        for (long d = 0; d < dim; d++) at[j * to.slot + d] = from[j * width + d];
}

/* Gradients of all inputs of the groups (which have the same slots) from `first` to before `last`; as above. */
int short_backward(const Call *call, long first, long last) {
    Memory memory = memory_for(call, 1);
    if (!memory.next) return 2;
    Memory rest = memory;
    Work work;
    plan(&work, call, &rest, 1);
    long slots = work.slots, width = work.value_dim, size = slots * width, windows = work.windows;
    int is_safe = 1;
    for (long group = first; group < last && is_safe; group++) {
        choose_pair(&work, group, 0);
        gather_slots(&work, call->inputs.query_slots, call->query_dim, work.query_maps);
        gather_slots(&work, call->inputs.key_slots, call->key_dim, work.key_maps);
        memset(work.of_query_slots, 0, (size_t)(slots * work.query_dim) * sizeof(float));
        memset(work.of_key_slots, 0, (size_t)(slots * work.key_dim) * sizeof(float));
        memset(work.of_slot_bias, 0, (size_t)slots * sizeof(float));
        memset(work.of_key_slot_bias, 0, (size_t)slots * sizeof(float));
        for (long row = 0; row < call->batch / call->slot_rows; row++) {
            choose_pair(&work, group, row);
            is_safe = read_row(&work);
            if (!is_safe) break;
            gather(&work, call->grad_output, call->value_dim, 1, work.upstream);
            float mass_before[slots];
            sum_behind(work.sums, windows, size, work.behind);
            for (long window = 0; window < windows; window++) window_back(&work, window);
            memset(mass_before, 0, sizeof mass_before);
            sum_behind(work.of_others, windows, size, work.behind);
            sum_behind(work.of_mass, windows, slots, work.mass);
            for (long window = 0; window < windows; window++) {
                const float *of_sums = sum_others(&work, work.of_others, window);
                float of_mass[slots];
                for (long j = 0; j < slots; j++) {
                    of_mass[j] = mass_before[j] + work.mass[window * slots + j];
                    mass_before[j] += work.of_mass[window * slots + j];
                }
                features_back(&work, window, of_sums, of_mass);
            }
        }
        const Inputs *grads = &call->grads;
        write_slots(&work, grads->query_slots, work.of_query_slots, call->query_dim, work.query_dim);
        write_slots(&work, grads->key_slots, work.of_key_slots, call->key_dim, work.key_dim);
        write_slots(&work, grads->query_slot_bias, work.of_slot_bias, 1, 1);
        write_slots(&work, grads->key_slot_bias, call->spreads ? work.of_key_slot_bias : work.of_slot_bias, 1, 1);
    }
    give_memory_back(memory);
    return !is_safe;
}
