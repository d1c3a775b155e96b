/* EVA of short inputs, one row and head after another; `reading.py`, `summaries.py` and `pooled.py` say what it is. */
#include "reading.h"
#include "summaries.h"

/* Tokens and summaries of a row and head. */
static void gather_row(Work *work) {
    const Call *call = work->call;
    gather_tokens(work, call->query, (float)call->root, work->query);
    gather_tokens(work, call->key, (float)call->root, work->key);
    gather_tokens(work, call->value, 1, work->value);
    memset(work->mass, 0, (size_t)(work->rows - work->tokens) * sizeof(float));
    for (long i = 0; i < work->sorts; i++)
        if (call->kind == LEARNED) make_pooled(work, &work->sort[i]);
        else make_variates(work, &work->sort[i]);
}

static long count_windows(const Work *work) { return work->places / work->call->window + (work->call->globals > 0); }

/* Output and log-sum-exp of the pairs of a row and a head from `first` to before `last`. 0 if done; 2: no memory. */
int short_forward(const Call *call, long first, long last) {
    Memory memory = memory_for(call, 0), rest = memory;
    if (!memory.next) return 2;
    Work work;
    plan(&work, call, &rest, 0);
    for (long pair = first, head = -1; pair < last; pair++) {
        choose_pair(&work, pair / call->together, pair % call->together);
        if (work.head != head) read_maps(&work);
        head = work.head;
        gather_row(&work);
        for (long window = 0; window < count_windows(&work); window++) write_read(&work, window);
    }
    give_memory_back(memory);
    return 0;
}

static void row_back(Work *work) {
    const Call *call = work->call;
    long width = work->wide_dim, windows = count_windows(work);
    float root = (float)call->root;
    gather_row(work);
    gather_tokens(work, call->grad_output, 1, work->upstream);
    memset(work->of_query, 0, (size_t)(work->tokens * width) * sizeof(float));
    memset(work->of_key, 0, (size_t)(work->rows * width) * sizeof(float));
    memset(work->of_value, 0, (size_t)(work->rows * width) * sizeof(float));
    memset(work->of_mass, 0, (size_t)(work->rows - work->tokens) * sizeof(float));
    for (long window = 0; window < windows; window++) read_back(work, window);
    for (long i = 0; i < work->sorts; i++)
        if (call->kind == LEARNED) pooled_back(work, &work->sort[i]);
        else variates_back(work, &work->sort[i]);
    scatter_tokens(work, 0, work->tokens, call->of_query, root, work->of_query);
    scatter_tokens(work, 0, work->tokens, call->of_key, root, work->of_key);
    scatter_tokens(work, 0, work->tokens, call->of_value, 1, work->of_value);
}

/* Gradients of all inputs of the groups (which have the same maps) from `first` to before `last`; as above. */
int short_backward(const Call *call, long first, long last) {
    Memory memory = memory_for(call, 1), rest = memory;
    if (!memory.next) return 2;
    Work work;
    plan(&work, call, &rest, 1);
    for (long group = first; group < last; group++) {
        choose_pair(&work, group, 0);
        read_maps(&work);
        for (int i = 0; i < MOST_MAPS; i++)
            memset(work.of_map[i], 0, (size_t)(map_rows(call, i) * work.wide_dim) * sizeof(float));
        for (long row = 0; row < call->together; row++) {
            choose_pair(&work, group, row);
            row_back(&work);
        }
        write_map_gradients(&work);
    }
    give_memory_back(memory);
    return 0;
}
