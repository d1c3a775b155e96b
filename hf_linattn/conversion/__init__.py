"""Conversion of stock models."""

from .convert import convert, revert

__all__ = ["convert", "revert"]
