from .inter_block import BlockReach
from .operator import block_slot_attention

__all__ = ["BlockReach", "block_slot_attention"]
