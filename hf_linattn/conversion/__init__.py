"""Conversion of stock models."""

from .calibrate import calibrate, needs_calibration
from .convert import convert, revert
from .image_size import set_image_size
from .positions import extend_positions

__all__ = ["calibrate", "convert", "extend_positions", "needs_calibration", "revert", "set_image_size"]
