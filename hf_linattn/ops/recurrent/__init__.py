"""Causal attention token by token: what a layer keeps instead of a kv cache, of a size that does not grow."""
