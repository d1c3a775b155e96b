from .inter_block import BlockReach
from .operator import inter_block_attention

__all__ = ["BlockReach", "inter_block_attention"]
