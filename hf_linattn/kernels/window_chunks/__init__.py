from .operator import window_chunk_attention

__all__ = ["window_chunk_attention"]
