from .operator import attend

__all__ = ["attend"]
