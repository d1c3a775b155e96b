"""What the Hugging Face Hub gets from the library besides the weights: the model card."""

from .card import render_card, write_card

__all__ = ["render_card", "write_card"]
