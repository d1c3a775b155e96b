"""The operations that cost time, each in plain torch and in Triton or C, behind one function.

attend          softmax attention that keeps its log-sum-exp
causal_slots    causal attention through slots (inter-chunk and intra-chunk)
block_slots     inter-block attention through slots: states of units of keys, their scan, the read-out
window_chunks   attention in a window and to summaries of chunks, under one softmax (EVA)
short_chunks    the same for short inputs on a CPU, which makes the summaries as well
short_slots     windows and slots under one softmax, on a CPU
decode          one token of generation through slots
half_norm       |x|^2 / 2 of every token
row_fit         FAVOR#'s constants of a row, and its tokens in their coordinates (C alone; in torch `ops.favor.fitted`)

In each folder `operator` has the public function and its torch operators, `torch_kernel` and `triton_launch` (with
`triton_kernel`) the two implementations; `short_chunks` and `short_slots` have `native_kernel` (with `native.c`) in
place of the second. `native` compiles C and has what C files share. `operators` registers the operators, and
`backends` decides which implementation runs. `slot_inputs` is what goes into attention through slots, and
`attention_state` what comes out of a softmax.
"""
