from .operator import short_slot_attention, suits_short

__all__ = ["short_slot_attention", "suits_short"]
