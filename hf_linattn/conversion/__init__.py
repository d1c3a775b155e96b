"""Conversion of stock models."""

from .calibrate import calibrate, needs_calibration
from .convert import convert, revert

__all__ = ["calibrate", "convert", "needs_calibration", "revert"]
