"""Causal attention token by token: what a layer keeps of the tokens it has seen, of a size that does not grow."""
