"""The few operations that cost time, each in portable torch and in Triton, behind one name and signature.

`attend` (softmax attention with its log-sum-exp), `scan` (states of blocks merged over blocks), `near` (slots inside a
causal chunk). `backend` says which implementation runs, `registration` makes operators of them.
"""
