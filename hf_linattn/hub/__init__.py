"""What the Hugging Face Hub gets from the library besides the weights: the model card, and results of evaluations."""

from .card import card_for, name_repository, render_card, write_card
from .header import BrokenCardError, add_tags, read_card
from .results import Measurement, write_results
from .transfer import TransferRecord

__all__ = [
    "BrokenCardError",
    "Measurement",
    "TransferRecord",
    "add_tags",
    "card_for",
    "name_repository",
    "read_card",
    "render_card",
    "write_card",
    "write_results",
]
