/* Summaries of the tokens of chunks, and the way back: control variates (summaries.py) and learned ones (pooled.py). */
#pragma once

#include "work.h"

/* -- rows ---------------------------------------------------------------------------------------------------------- */
/* to = a x + b y. */
INLINE void combine(long numbers, float a, const float *x, float b, const float *y, float *to) {
    for (long n = 0; n < numbers; n += LANES) store(to + n, load(x + n) * a + load(y + n) * b);
}

INLINE float dot(long numbers, const float *x, const float *y) {
    vec sum = {0};
    for (long n = 0; n < numbers; n += LANES) sum += load(x + n) * load(y + n);
    return sum_of(sum);
}

/* -- members ------------------------------------------------------------------------------------------------------- */
/* One over the number of members with a token; 0 without any. */
static float share_of(const Work *work, const Sort *sort, long chunk) {
    long real = 0;
    for (long m = 0; m < sort->members; m++) real += is_real(work, chunk * sort->members + m);
    return real ? 1 / (float)real : 0;
}

/* Means of the members of all chunks. */
static void means(const Work *work, const Sort *sort, const float *rows, float *to) {
    long width = work->wide_dim, members = sort->members;
    for (long chunk = 0; chunk < sort->count; chunk++, to += width) {
        float share = share_of(work, sort, chunk);
        for (long d = 0; d < width; d += LANES) {
            vec sum = {0};
            for (long m = 0; m < members; m++) sum += load(rows + (chunk * members + m) * width + d);
            store(to + d, sum * share);
        }
    }
}

static void means_back(const Work *work, const Sort *sort, const float *of_means, float *of_rows) {
    long width = work->wide_dim, members = sort->members;
    for (long chunk = 0; chunk < sort->count; chunk++, of_means += width) {
        float share = share_of(work, sort, chunk);
        for (long m = 0; m < members; m++, of_rows += width) combine(width, 1, of_rows, share, of_means, of_rows);
    }
}

/* Logits in place become a softmax over the members of every chunk; 0 for a place without a token. */
static void weigh_members(const Work *work, const Sort *sort, float *logits) {
    long members = sort->members;
    for (long chunk = 0; chunk < sort->count; chunk++) {
        float *own = logits + chunk * members, most = -INFINITY;
        for (long m = 0; m < members; m++) {
            if (!is_real(work, chunk * members + m)) own[m] = -INFINITY;
            most = own[m] > most ? own[m] : most;
        }
        for (long m = 0; m < members; m++) own[m] = own[m] == -INFINITY ? -INFINITY : own[m] - most;
    }
    for (long place = 0; place < work->places; place += LANES)
        store(logits + place, exponential(load(logits + place)));
    for (long chunk = 0; chunk < sort->count; chunk++) {
        float *own = logits + chunk * members, sum = 0;
        for (long m = 0; m < members; m++) sum += own[m];
        float inverse = sum == 0 ? 0 : 1 / sum;
        for (long m = 0; m < members; m++) own[m] *= inverse;
    }
}

/* From the gradients of members' weights, in place, those of their logits. */
static void members_back(const Sort *sort, const float *weights, float *gradients) {
    for (long chunk = 0; chunk < sort->count; chunk++, weights += sort->members, gradients += sort->members) {
        float sum = 0;
        for (long m = 0; m < sort->members; m++) sum += weights[m] * gradients[m];
        for (long m = 0; m < sort->members; m++) gradients[m] = weights[m] * (gradients[m] - sum);
    }
}

/* Weighted sums of the members of all chunks. */
static void pool(const Work *work, const Sort *sort, const float *weights, const float *rows, float *to) {
    long width = work->wide_dim, members = sort->members;
    for (long chunk = 0; chunk < sort->count; chunk++, weights += members, rows += members * width, to += width)
        for (long d = 0; d < width; d += LANES) {
            vec sum = {0};
            for (long m = 0; m < members; m++) sum += load(rows + m * width + d) * weights[m];
            store(to + d, sum);
        }
}

/* -- control variates ---------------------------------------------------------------------------------------------- */
static void make_variates(Work *work, Sort *sort) {
    const Call *call = work->call;
    long dim = work->dim, width = work->wide_dim, members = sort->members, size = sort->count * width;
    float *key = work->key + sort->first * width, *value = work->value + sort->first * width;
    float *mean = sort->mean, *proposal = sort->proposal;
    int takes_queries = call->kind == SUM || call->kind == MEAN;
    means(work, sort, work->key, mean);
    memset(proposal, 0, (size_t)size * sizeof(float));
    if (call->maps[KEY_MAP])
        product(sort->count, width, dim, rows_of(mean, width), work->map[KEY_MAP], width, proposal, width);
    combine(size, 1, mean, 1, proposal, key);
    if (members == 1) {
        memcpy(value, work->value, (size_t)size * sizeof(float));
        return;
    }
    if (takes_queries) {
        means(work, sort, work->query, sort->query_mean);
        combine(size, 1, proposal, 1, sort->query_mean, proposal);
        if (call->maps[QUERY_MAP])
            add_product(
                sort->count, width, dim, rows_of(sort->query_mean, width), work->map[QUERY_MAP], width, proposal, width
            );
    }
    if (call->kind == MEAN) combine(size, 0.5f, proposal, -0.5f, mean, proposal);
    if (call->kind == NONE)
        for (long n = 0; n < size; n += LANES) store(proposal + n, -load(mean + n));
    /* `mu . y - |y|^2 / 2` relative to the mean, which all members have in common. */
    for (long place = 0; place < work->places; place++) {
        const float *own = work->key + place * width, *at = mean + place / members * width;
        const float *to = proposal + place / members * width;
        vec sum = {0};
        for (long d = 0; d < width; d += LANES) {
            vec centred = load(own + d) - load(at + d);
            sum += (load(to + d) - 0.5f * centred) * centred;
        }
        sort->weights[place] = sum_of(sum);
    }
    weigh_members(work, sort, sort->weights);
    pool(work, sort, sort->weights, work->value, value);
}

/* Adds a map's share of the gradient of what it is added to, `of_sum` in place, and of itself. */
static void map_back(Work *work, const Sort *sort, int map, const float *from, float *of_sum, float *scratch) {
    long dim = work->dim, width = work->wide_dim;
    if (!work->call->maps[map]) return;
    add_product(dim, width, sort->count, columns_of(from, width), of_sum, width, work->of_map[map], width);
    memcpy(scratch, of_sum, (size_t)(sort->count * width) * sizeof(float));
    add_product(sort->count, width, dim, rows_of(scratch, width), work->transposed[map], width, of_sum, width);
}

static void variates_back(Work *work, const Sort *sort) {
    const Call *call = work->call;
    long width = work->wide_dim, members = sort->members, size = sort->count * width;
    float *of_mean = work->of_key + sort->first * width, *of_proposal = work->scratch[0];
    const float *of_content = work->of_value + sort->first * width;
    float *of_logits = work->logits[0];
    if (members == 1) {
        combine(size, 1, work->of_value, 1, of_content, work->of_value);
    } else {
        for (long place = 0; place < work->places; place++)
            of_logits[place] = dot(width, work->value + place * width, of_content + place / members * width);
        members_back(sort, sort->weights, of_logits);
        memset(of_proposal, 0, (size_t)size * sizeof(float));
        for (long place = 0; place < work->places; place++) {
            long at = place / members * width, own = place * width;
            float weight = sort->weights[place], of_logit = of_logits[place];
            for (long d = 0; d < width; d += LANES) {
                vec centred = load(work->key + own + d) - load(sort->mean + at + d);
                vec direction = load(sort->proposal + at + d) - centred;
                store(work->of_value + own + d, load(work->of_value + own + d) + load(of_content + at + d) * weight);
                store(work->of_key + own + d, load(work->of_key + own + d) + direction * of_logit);
                store(of_proposal + at + d, load(of_proposal + at + d) + centred * of_logit);
            }
        }
        float share = call->kind == NONE ? 0 : call->kind == MEAN ? 0.5f : 1;
        combine(size, share, of_proposal, 1, of_mean, of_mean);
        if (call->kind == SUM || call->kind == MEAN) {
            combine(size, share, of_proposal, 0, of_proposal, of_proposal);
            map_back(work, sort, QUERY_MAP, sort->query_mean, of_proposal, work->scratch[1]);
            means_back(work, sort, of_proposal, work->of_query);
        }
    }
    map_back(work, sort, KEY_MAP, sort->mean, of_mean, work->scratch[1]);
    means_back(work, sort, of_mean, work->of_key);
}

/* -- learned ------------------------------------------------------------------------------------------------------- */
static void make_pooled(Work *work, Sort *sort) {
    long dim = work->dim, width = work->wide_dim, count = sort->count, size = count * width;
    float *key = work->key + sort->first * width, *value = work->value + sort->first * width;
    if (sort->members == 1) {
        memcpy(sort->mean, work->key, (size_t)size * sizeof(float));
        memcpy(value, work->value, (size_t)size * sizeof(float));
    } else {
        for (long place = 0; place < work->places; place++) {
            const float *own = work->key + place * width;
            sort->weights[place] = dot(width, own, work->map[KEY_POOLING]);
            sort->value_weights[place] = dot(width, own, work->map[VALUE_POOLING]);
        }
        weigh_members(work, sort, sort->weights);
        weigh_members(work, sort, sort->value_weights);
        pool(work, sort, sort->weights, work->key, sort->mean);
        pool(work, sort, sort->value_weights, work->value, value);
    }
    memcpy(sort->mapped, sort->mean, (size_t)size * sizeof(float));
    add_product(count, width, dim, rows_of(sort->mean, width), work->map[KEY_ADAPTER], width, sort->mapped, width);
    float *mass = work->mass + sort->first - work->tokens;
    for (long chunk = 0; chunk < count; chunk++) {
        const float *mapped = sort->mapped + chunk * width;
        combine(width, 1, mapped, 1, work->map[FAR_SLOPE], key + chunk * width);
        mass[chunk] = work->map[FAR_OFFSET][0] + dot(width, mapped, work->map[KEY_SLOPE]);
    }
    add_product(
        count, width, dim, rows_of(sort->mapped, width), work->transposed[QUERY_ADAPTER], width, key, width
    );
}

static void pooled_back(Work *work, const Sort *sort) {
    long dim = work->dim, width = work->wide_dim, count = sort->count, size = count * width, members = sort->members;
    const float *of_read = work->of_key + sort->first * width, *of_pooled_value = work->of_value + sort->first * width;
    const float *of_mass = work->of_mass + sort->first - work->tokens;
    float *of_mapped = work->scratch[0], **of_map = work->of_map;
    memcpy(of_mapped, of_read, (size_t)size * sizeof(float));
    add_product(count, width, dim, rows_of(of_read, width), work->map[QUERY_ADAPTER], width, of_mapped, width);
    add_product(dim, width, count, columns_of(of_read, width), sort->mapped, width, of_map[QUERY_ADAPTER], width);
    for (long chunk = 0; chunk < count; chunk++) {
        float *own = of_mapped + chunk * width;
        of_map[FAR_OFFSET][0] += of_mass[chunk];
        combine(width, 1, of_map[FAR_SLOPE], 1, of_read + chunk * width, of_map[FAR_SLOPE]);
        combine(width, 1, of_map[KEY_SLOPE], of_mass[chunk], sort->mapped + chunk * width, of_map[KEY_SLOPE]);
        combine(width, 1, own, of_mass[chunk], work->map[KEY_SLOPE], own);
    }
    map_back(work, sort, KEY_ADAPTER, sort->mean, of_mapped, work->scratch[1]);
    const float *of_pooled = of_mapped;
    if (members == 1) {
        combine(size, 1, work->of_key, 1, of_pooled, work->of_key);
        combine(size, 1, work->of_value, 1, of_pooled_value, work->of_value);
        return;
    }
    float *of_logits = work->logits[0], *of_value_logits = work->logits[1];
    for (long place = 0; place < work->places; place++) {
        of_logits[place] = dot(width, work->key + place * width, of_pooled + place / members * width);
        of_value_logits[place] = dot(width, work->value + place * width, of_pooled_value + place / members * width);
    }
    members_back(sort, sort->weights, of_logits);
    members_back(sort, sort->value_weights, of_value_logits);
    for (long place = 0; place < work->places; place++) {
        float *of_key = work->of_key + place * width, *of_value = work->of_value + place * width;
        long at = place / members * width;
        for (long d = 0; d < width; d += LANES) {
            vec key = load(work->key + place * width + d), of_logit = all(of_logits[place]);
            vec of_value_logit = all(of_value_logits[place]);
            vec found = load(of_pooled + at + d) * sort->weights[place];
            found += of_logit * load(work->map[KEY_POOLING] + d) + of_value_logit * load(work->map[VALUE_POOLING] + d);
            store(of_key + d, load(of_key + d) + found);
            store(of_value + d, load(of_value + d) + load(of_pooled_value + at + d) * sort->value_weights[place]);
            store(of_map[KEY_POOLING] + d, load(of_map[KEY_POOLING] + d) + key * of_logit);
            store(of_map[VALUE_POOLING] + d, load(of_map[VALUE_POOLING] + d) + key * of_value_logit);
        }
    }
}
