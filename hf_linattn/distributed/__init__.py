"""Layers on several processes that share sequences (each has a part of the tokens), heads, or weights (FSDP2)."""
