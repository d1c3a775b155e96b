"""What the Hugging Face Hub gets from the library besides the weights: the model card."""

from .card import card_for, render_card, write_card
from .header import BrokenCardError, add_tags, read_card

__all__ = ["BrokenCardError", "add_tags", "card_for", "read_card", "render_card", "write_card"]
