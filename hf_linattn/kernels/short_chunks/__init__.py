from .operator import short_pooled, short_variates

__all__ = ["short_pooled", "short_variates"]
