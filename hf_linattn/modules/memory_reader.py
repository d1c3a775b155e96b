"""Which layer a memory belongs to: the one that has read its first tokens, with its settings and tensors of then."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from ..errors import InputError, UnsupportedError
from .base import LinearAttention
from .config import AttentionConfig
from .contract import AttentionInputs, LayerShape


class FirstReader(NamedTuple):
    """The layer that has read the first tokens of a memory.

    Args:
        layer: `None` in copies and pickles, which any layer of the same settings may go on with.
        revision: Of its tensors (`LinearAttention.revision`) then.
    """

    config: AttentionConfig
    shape: LayerShape
    layer: weakref.ref[LinearAttention] | None
    revision: int

    @classmethod
    def of(cls, layer: LinearAttention) -> FirstReader:
        return cls(layer.config, layer.shape, weakref.ref(layer), layer.revision)

    def without_layer(self) -> FirstReader:
        return self._replace(layer=None)

    def check(self, layer: LinearAttention) -> None:
        """Raise `InputError` for a layer that has other settings, or other tensors than at the first tokens."""
        if (self.config, self.shape) != (layer.config, layer.shape):
            raise InputError(
                f"This memory belongs to another layer: {self._difference(layer)}. Start with a new cache."
            )
        if self.layer is not None and self.layer() is layer and self.revision != layer.revision:
            raise InputError(
                f"The directions or statistics of layer {layer.shape.layer_idx} have changed (a redraw, a calibration,"
                " other weights) since it read the first tokens, and what it remembers of them was made with the old"
                " ones. Start with a new cache."
            )

    def _difference(self, layer: LinearAttention) -> str:
        if self.config.kind != layer.config.kind:
            return f"filled by {self.config.kind!r}, given to {layer.config.kind!r}"
        filled, given = ({**own.config.to_dict(), **vars(own.shape)} for own in (self, layer))
        names = [name for name in filled if filled[name] != given[name]]
        return "filled with and given to " + ", ".join(
            f"{name}={filled[name]!r} and {name}={given[name]!r}" for name in names
        )


def check_piece(layer: LinearAttention, inputs: AttentionInputs) -> None:
    """Raise if a layer cannot read these tokens as a piece of a longer sequence."""
    query, key = inputs.query, inputs.key
    if not layer.shape.is_causal:
        raise UnsupportedError("Only a causal layer can read a sequence piece by piece; this one sees later tokens.")
    if query.shape[:3] != key.shape[:3]:
        raise InputError(
            "A layer with a memory takes queries and keys of the same, new tokens; got"
            f" {tuple(query.shape)} and {tuple(key.shape)}."
        )
