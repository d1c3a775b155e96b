from .operator import inter_block_attention
from .reach import BlockReach

__all__ = ["BlockReach", "inter_block_attention"]
