from .operator import half_norm

__all__ = ["half_norm"]
