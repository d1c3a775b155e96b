"""What the Hugging Face Hub gets from the library besides the weights: the model card."""

from .card import card_for, name_repository, render_card, write_card
from .header import BrokenCardError, add_tags, read_card
from .transfer import TransferRecord

__all__ = [
    "BrokenCardError",
    "TransferRecord",
    "add_tags",
    "card_for",
    "name_repository",
    "read_card",
    "render_card",
    "write_card",
]
