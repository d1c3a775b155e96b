from .operator import half_norm, length_bias

__all__ = ["half_norm", "length_bias"]
