/* What the C kernel of short chunks is called with, and its memory for one row and head.

Rows are numbered: tokens at their places, window after window, then global tokens, then summaries, sort after sort.
Places are such that the members of a window or chunk are neighbours; one without a token has zeros. Queries and keys
are scaled by the root of the factor of the dot product, and so are the keys of summaries.
*/
#pragma once

#include "tokens.h"

#define MOST_SORTS 2
#define MOST_MAPS 7

/* Of the summaries: what a control variate's value is at, as in summaries.py, or learned ones. */
enum { SUM, MEAN, KEY, NONE, LEARNED };
/* Maps of control variates, and of learned summaries. */
enum { QUERY_MAP, KEY_MAP };
enum { KEY_POOLING, VALUE_POOLING, KEY_ADAPTER, QUERY_ADAPTER, FAR_OFFSET, FAR_SLOPE, KEY_SLOPE };

/* together: Rows of the batch that one call adds up the gradients of maps of. tables: 1, or a table for each row.
members: Places of a summary of each sort, 0 if there is no second sort. token_of: `[tables][places + globals]`, -1 for
a place without a token. far: `[tables][windows][globals + summaries]`, log-weights, `-inf` of what is not read. */
typedef struct {
    long batch, heads, together, tables, dim, places, window, globals, kind, members[MOST_SORTS];
    double root;
    const int64_t *token_of;
    const float *far;
    Tokens query, key, value, output, lse, grad_output, grad_lse, of_query, of_key, of_value;
    const float *maps[MOST_MAPS]; /* [heads, dim, dim], [heads, dim] or [heads]; NULL for none */
    float *of_maps[MOST_MAPS];
} Call;

/* Summaries of one length, `first` the number of their first row. `[count][wide_dim]`: means (pooled keys), those
mapped, means of queries, proposals less means. `[places]`: weights of members, in keys and values if those differ. */
typedef struct {
    long members, count, first;
    float *mean, *mapped, *query_mean, *proposal, *weights, *value_weights;
} Sort;

/* Neighbouring rows that are read. */
typedef struct {
    long first, count;
} Run;

typedef struct {
    const Call *call;
    long batch, head, dim, places, tokens, rows, sorts; /* tokens: with global ones. rows: with summaries */
    long wide, wide_dim;                                /* of whole vectors: a window, a token */
    const int64_t *token_of;
    const float *far;
    Sort sort[MOST_SORTS];
    float *query, *key, *value, *mass;                  /* [rows][wide_dim]; mass: [rows - tokens], log-weights */
    float *columns, *weights, *log_weights, *result;    /* of one window: [dim][wide], [rows][wide], [rows] */
    Run *runs;
    long run_count, read_count;
    float *map[MOST_MAPS], *transposed[MOST_MAPS], *of_map[MOST_MAPS]; /* rows of wide_dim */
    float *upstream, *upstream_columns, *of_weights;    /* gradients: of the output, and as above */
    float *of_query, *of_key, *of_value, *of_mass;
    float *scratch[3];                                  /* [summaries][wide_dim] */
    float *logits[2];                                   /* [places] */
} Work;

/* -- memory -------------------------------------------------------------------------------------------------------- */
/* Rows of a map; 0 for one that is not there. */
static long map_rows(const Call *call, int map) {
    int is_square = call->kind != LEARNED || map == KEY_ADAPTER || map == QUERY_ADAPTER;
    return !call->maps[map] ? 0 : is_square ? call->dim : 1;
}

static void plan(Work *work, const Call *call, Memory *memory, int is_backward) {
    long places = call->places, tokens = places + call->globals, wide_dim = padded(call->dim);
    long queries = call->window > call->globals ? call->window : call->globals, wide = padded(queries);
    *work = (Work){
        .call = call, .dim = call->dim, .places = places, .tokens = tokens, .rows = tokens, .wide = wide,
        .wide_dim = wide_dim,
    };
    for (int i = 0; i < MOST_SORTS && call->members[i]; i++) {
        Sort *sort = &work->sort[work->sorts++];
        *sort = (Sort){.members = call->members[i], .count = places / call->members[i], .first = work->rows};
        work->rows += sort->count;
        sort->mean = part_of(memory, sort->count * wide_dim);
        sort->mapped = part_of(memory, sort->count * wide_dim);
        sort->query_mean = part_of(memory, sort->count * wide_dim);
        sort->proposal = part_of(memory, sort->count * wide_dim);
        sort->weights = part_of(memory, places);
        sort->value_weights = part_of(memory, places);
    }
    long rows = work->rows, summaries = rows - tokens;
    work->query = part_of(memory, tokens * wide_dim);
    work->key = part_of(memory, rows * wide_dim);
    work->value = part_of(memory, rows * wide_dim);
    work->mass = part_of(memory, summaries);
    work->columns = part_of(memory, wide * wide_dim);
    work->weights = part_of(memory, rows * wide);
    work->log_weights = part_of(memory, rows);
    work->result = part_of(memory, queries * wide_dim);
    work->runs = (Run *)part_of(memory, rows * (long)(sizeof(Run) / sizeof(float)));
    for (int i = 0; i < MOST_MAPS; i++) {
        work->map[i] = part_of(memory, map_rows(call, i) * wide_dim);
        work->transposed[i] = part_of(memory, map_rows(call, i) * wide_dim);
        work->of_map[i] = part_of(memory, is_backward ? map_rows(call, i) * wide_dim : 0);
    }
    if (!is_backward) return;
    work->upstream = part_of(memory, tokens * wide_dim);
    work->upstream_columns = part_of(memory, wide * wide_dim);
    work->of_weights = part_of(memory, rows * wide);
    work->of_query = part_of(memory, tokens * wide_dim);
    work->of_key = part_of(memory, rows * wide_dim);
    work->of_value = part_of(memory, rows * wide_dim);
    work->of_mass = part_of(memory, summaries);
    for (int i = 0; i < 3; i++) work->scratch[i] = part_of(memory, summaries * wide_dim);
    for (int i = 0; i < 2; i++) work->logits[i] = part_of(memory, places);
}

static Memory memory_for(const Call *call, int is_backward) {
    Work work;
    Memory counted = {NULL, NULL};
    plan(&work, call, &counted, is_backward);
    return take_memory(counted.next - (float *)NULL);
}

/* Pairs of a row and a head, numbered so that neighbours have the same maps. */
static void choose_pair(Work *work, long group, long row) {
    const Call *call = work->call;
    work->batch = group / call->heads * call->together + row;
    work->head = group % call->heads;
    long table = call->tables > 1 ? work->batch : 0, windows = work->places / call->window;
    work->token_of = call->token_of + table * work->tokens;
    work->far = call->far + table * windows * (work->rows - work->places);
}

/* -- tokens -------------------------------------------------------------------------------------------------------- */
INLINE int is_real(const Work *work, long place) { return work->token_of[place] >= 0; }

/* Of the token at a place: its number in `x`. */
INLINE float *number_at(const Work *work, Tokens x, long place) {
    return token_at(x, work->batch, work->head, work->token_of[place]);
}

static void gather_tokens(const Work *work, Tokens x, float factor, float *rows) {
    gather(work->token_of, work->tokens, x, work->batch, work->head, work->dim, factor, rows);
}

/* To the tokens of `count` places, from `first` on. */
static void scatter_tokens(const Work *work, long first, long count, Tokens x, float factor, const float *rows) {
    scatter(work->token_of + first, count, x, work->batch, work->head, work->dim, factor, rows);
}

/* -- maps ---------------------------------------------------------------------------------------------------------- */
static void read_maps(Work *work) {
    const Call *call = work->call;
    long dim = work->dim, wide_dim = work->wide_dim;
    for (int i = 0; i < MOST_MAPS; i++) {
        long rows = map_rows(call, i), width = call->kind == LEARNED && i == FAR_OFFSET ? 1 : dim;
        const float *from = call->maps[i] + (rows ? work->head * rows * width : 0);
        for (long row = 0; row < rows; row++) {
            float *to = work->map[i] + row * wide_dim;
            memcpy(to, from + row * width, (size_t)width * sizeof(float));
            memset(to + width, 0, (size_t)(wide_dim - width) * sizeof(float));
        }
        if (rows > 1 || dim == 1) transpose(rows, dim, work->map[i], wide_dim, work->transposed[i], wide_dim);
    }
}

static void write_map_gradients(const Work *work) {
    const Call *call = work->call;
    for (int i = 0; i < MOST_MAPS; i++) {
        long rows = map_rows(call, i), width = call->kind == LEARNED && i == FAR_OFFSET ? 1 : work->dim;
        if (!call->of_maps[i]) continue;
        float *to = call->of_maps[i] + work->head * rows * width;
        for (long row = 0; row < rows; row++)
            memcpy(to + row * width, work->of_map[i] + row * work->wide_dim, (size_t)width * sizeof(float));
    }
}
