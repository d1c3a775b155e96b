from .operator import short_chunk_attention

__all__ = ["short_chunk_attention"]
