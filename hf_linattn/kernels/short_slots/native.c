/* Attention of short inputs through windows and slots, one row and head after another; `reading.py` says what it is. */
#include "gradients.h"

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
            gather_tokens(&work, call->grad_output, call->value_dim, 1, work.upstream);
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
