"""Conversion of stock models."""

from .calibrate import calibrate
from .convert import convert, revert

__all__ = ["calibrate", "convert", "revert"]
