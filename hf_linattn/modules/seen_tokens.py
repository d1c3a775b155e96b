"""Which tokens of growing sequences a memory has read, and which of them were real."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.recurrent.pending import added, fingerprint


@dataclass(frozen=True)
class SeenTokens:
    """The tokens of a batch of sequences that have been read.

    Args:
        count: Tokens of a sequence.
        real: Which ones were real (`fingerprint`, a number a row); `None`: all.
    """

    count: int = 0
    real: tuple[int, ...] | None = None

    def then(self, key_mask: Tensor | None, tokens: int, batch: int) -> SeenTokens:
        """These and the next `tokens` ones, with their mask `[batch, tokens]`. Reads values of a mask."""
        real = self.real
        if key_mask is not None or real is not None:
            real = added(self._fingerprint(batch), _fingerprint_of(key_mask, tokens, self.count, batch))
        return SeenTokens(self.count + tokens, real)

    def without_last(self, key_mask: Tensor | None, tokens: int, batch: int) -> SeenTokens:
        """These without the last `tokens` ones, whose mask is `key_mask` `[batch, tokens]`."""
        real, count = self.real, self.count - tokens
        if real is not None:
            real = added(real, tuple(-z for z in _fingerprint_of(key_mask, tokens, count, batch)))
        return SeenTokens(count, real)

    def rows(self, index: Tensor) -> SeenTokens:
        """Those of the rows `index` `[rows]`, in that order."""
        return self if self.real is None else replace(self, real=tuple(self.real[row] for row in index.tolist()))

    def check(self, real: tuple[int, ...] | None, batch: int) -> None:
        """Raise `InputError` if a mask calls other tokens real than were read; `None` stands for all."""
        if not self.count or (real is None and self.real is None):
            return
        told = _fingerprint_of(None, self.count, 0, batch) if real is None else real
        rows = [row for row, pair in enumerate(zip(told, self._fingerprint(batch), strict=True)) if pair[0] != pair[1]]
        if rows:
            raise InputError(
                f"attention_mask calls other tokens real among the {self.count} earlier ones than when they were read,"
                f" in rows {rows}. What a layer with a state of constant size has read cannot be masked, or unmasked,"
                " later: pass the attention_mask over all tokens that was used before, followed by that of the new"
                " ones. (Given none, `generate` makes one from pad_token_id.)"
            )

    def _fingerprint(self, batch: int) -> tuple[int, ...]:
        return _fingerprint_of(None, self.count, 0, batch) if self.real is None else self.real


def _fingerprint_of(key_mask: Tensor | None, tokens: int, start: int, batch: int) -> tuple[int, ...]:
    if key_mask is not None:
        return fingerprint(key_mask, start)
    return fingerprint(torch.ones(1, tokens, dtype=torch.bool), start) * batch
