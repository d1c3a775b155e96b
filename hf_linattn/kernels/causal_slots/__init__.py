from .operator import causal_slot_attention

__all__ = ["causal_slot_attention"]
