"""The operations that cost time, each in plain torch and in Triton, behind one function.

attend          softmax attention that keeps its log-sum-exp
causal_slots    causal attention through slots (inter-chunk and intra-chunk)
block_slots     inter-block attention through slots: states of units of keys, their scan, the read-out
window_chunks   attention in a window and to summaries of chunks, under one softmax (EVA)
decode          one token of generation through slots
short_slots     windows and slots under one softmax, for short inputs on a CPU
half_norm       |x|^2 / 2 of every token

In each folder `operator` has the public function and its torch operators, `torch_kernel` and `triton_launch` (with
`triton_kernel`) the two implementations; `short_slots` has the first alone. `operators` registers them, and `backends`
decides which one runs. `slot_inputs` is what goes into attention through slots, and `attention_state` what comes out
of a softmax.
"""
