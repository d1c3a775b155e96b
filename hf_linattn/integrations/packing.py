"""Packed (padding-free) input: where its sequences start, found once per model, and what of it cannot be followed.

A padding-free collator says it in up to four ways: positions that restart, the number of the sequence of each token
(`seq_idx`), where sequences start among all tokens (`cu_seq_lens_q`, `cu_seq_lens_k`), and the mask that Transformers
makes of positions. All that are there have to agree. The layers compute the sequences in groups of similar length
(`ops/row_groups.py`); a padded batch may be taken apart in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..modules.config import AttentionConfig
from ..modules.registry import get_kind
from ..ops.row_groups import RowGroups
from .checks import MASKED, PACKED, TRACED, check_positions, is_ordered, require
from .keywords import BORDERS, LONGEST, PACKING
from .seams import calling_cache, is_tracing
from .token_mask import TokenMask

_AGREE = (
    "Pass them as DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True) makes them, or leave"
    " one out. (Without position_ids a model with a table of positions counts through the whole row.)"
)
_DISAGREES = f"hf_linattn: cu_seq_lens_q and what else says where packed sequences start disagree. {_AGREE}"


class Sequences:
    """The sequences of a batch: several in a row (`is_packed`), or padded.

    Args:
        shape: `(batch, tokens)`.
        borders: `[sequences + 1]`, where they start among all tokens. key_mask: `[batch, tokens]` bool, True where a
            token is real. One of the two.
        longest: Tokens of the longest sequence, or more; needed while tracing.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        borders: Tensor | None = None,
        key_mask: Tensor | None = None,
        longest: int | None = None,
    ) -> None:
        self.shape, self.borders, self.key_mask, self.longest = shape, borders, key_mask, longest
        self.is_packed = borders is not None
        self._made: dict[tuple[torch.device, int], RowGroups | None] = {}

    def rows(self, device: torch.device, exact_length: int = 0) -> RowGroups | None:
        """Their groups, the same tensors for all layers on a device; `None` where no token is real."""
        if is_tracing(self.borders):  # a layer within a checkpoint must not change what lies outside of it
            return self._rows(device, exact_length)
        key = (device, exact_length)
        if key not in self._made:
            self._made[key] = self._rows(device, exact_length)
        return self._made[key]

    def as_padded(self, device: torch.device) -> RowGroups:
        """One group of all packed sequences: a padded batch."""
        assert self.borders is not None
        return RowGroups.from_cu_seqlens(self.borders, self.shape, device=device, is_one=True)

    def _rows(self, device: torch.device, exact_length: int) -> RowGroups | None:
        if self.borders is None:
            assert self.key_mask is not None
            return RowGroups.from_key_mask(self.key_mask.to(device), exact_length=exact_length)
        options: dict[str, Any] = {"max_length": self.longest, "exact_length": exact_length, "device": device}
        return RowGroups.from_cu_seqlens(self.borders, self.shape, **options)


def padded_sequences(mask: Any, key_mask: Tensor, query: Tensor) -> Sequences | None:
    """The sequences of a padded batch where taking them apart is faster than masking: on CPUs, outside of graphs.

    Args:
        mask: What the attention function was given; a `TokenMask` keeps them for the other layers.
    """
    if not isinstance(mask, TokenMask) or query.device.type != "cpu" or is_tracing(query):
        return None
    if mask.padded is None:
        mask.padded = Sequences((query.shape[0], query.shape[2]), key_mask=key_mask)
    found: Sequences = mask.padded
    return found


def exact_length(config: AttentionConfig, *, is_causal: bool) -> int:
    """Up to how many tokens a sequence is softmax attention in a layer, so that such rows are kept together."""
    length = 0
    if torch.compiler.is_compiling():  # one group, whatever their lengths
        return length
    if get_kind(config.kind).module_cls.is_exact_in_window(config):
        window = config.window_size or 0
        overlaps = is_causal and config.overlap_window
        length = 2 * window if overlaps else window + (config.num_global_tokens or 0)
    return max(length, config.exact_below)


def check_has_positions(config: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise `InputError` for packed sequences without positions, which would be counted through the whole row."""
    if kwargs.get("position_ids") is None and any(kwargs.get(name) is not None for name in PACKING):
        raise InputError(
            f"Packed sequences need position_ids that restart: {type(config).__name__} counts through the whole row"
            f" without them. {PACKED}"
        )


def grouped_rows(sequences: Sequences, config: AttentionConfig, key: Tensor, *, is_causal: bool) -> RowGroups | None:
    """The groups in which a layer takes the sequences of a batch.

    Args:
        key: `[batch, heads, tokens, head_dim]`.
    Returns: `None` for a padded batch without real tokens, and for one whose width says that all of it is softmax
        attention: that costs less than making groups.
    """
    length = exact_length(config, is_causal=is_causal)
    if not sequences.is_packed and key.shape[2] <= length:
        return None
    return sequences.rows(key.device, length)


def find_sequences(
    given: Mapping[str, Any], mask: Any, query: Tensor, keys: int, *, is_cross: bool, has_cache: bool
) -> tuple[Sequences | None, Tensor]:
    """The packed sequences of a call whose mask, positions or other arguments say that there are some.

    Args:
        given: Keyword arguments of the call. mask: What it was given, as a rule a `TokenMask`.
        query: `[batch, heads, queries, head_dim]`. keys: How many there are.
        has_cache: Whether a cache of ours goes with the call.
    Returns: The sequences, `None` if there is one a row; and `query`, to be used instead of it: while tracing the
        graph checks its values.
    Raises: InputError where the arguments disagree, or come with padding or a cache; UnsupportedError for
        cross-attention.
    """
    made = mask if isinstance(mask, TokenMask) else None
    key_mask = mask if made is None else made.tokens
    positions, shape = given.get("position_ids"), (query.shape[0], query.shape[2])
    asked = {name: given[name] for name in sorted(PACKING) if given.get(name) is not None}
    sources = (*(asked.get(name) for name in sorted(PACKING)), positions)
    if made is not None and made.found is not None and _same(made.found[0], sources):
        found: Sequences | None = made.found[1]
        return found, query
    if is_cross:
        raise UnsupportedError(f"Cross-attention is not computed for packed sequences. {PACKED}")
    if has_cache or shape[1] != keys:
        _check_no_cache(positions, key_mask, shape[1])
    is_masked = mask is not None if made is None else made.was_given
    if key_mask is not None or (is_masked and not asked):
        check_positions(positions, key_mask, shape[1], MASKED)
        raise InputError(f"{', '.join(asked)} came with an attention_mask that has padding. {MASKED}")
    if is_tracing(query):
        found, query = _traced(asked, made, positions, query, shape)
    else:
        found = _read(asked, made, positions, shape)
        if found is not None and calling_cache() is not None:
            _check_no_cache(positions, key_mask, shape[1])
    # As in `checks.require_order`.
    if made is not None and not (is_tracing(query) and torch.is_grad_enabled()):
        made.found = (sources, found)
    return found, query


def _check_no_cache(positions: Any, key_mask: Tensor | None, tokens: int) -> None:
    advice = f"A cache keeps one sequence a row: pass use_cache=False. {PACKED}"
    if isinstance(positions, Tensor):
        check_positions(positions, key_mask, tokens, advice)
    raise InputError(f"Packed sequences cannot be put into a cache. {advice}")


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(one, other, strict=True))


# -- values that are there ------------------------------------------------------------------------------------------
def _read(
    asked: Mapping[str, Any], made: TokenMask | None, positions: Tensor | None, shape: tuple[int, int]
) -> Sequences | None:
    """Where sequences start, by all that says so."""
    said: dict[str, Tensor] = {}
    if made is not None and made.starts is not None:
        said["the mask that Transformers made of position_ids"] = made.starts.cpu()
    for name in BORDERS:
        if name in asked:
            said[name] = _starts_of_borders(name, asked[name], shape)
    if "seq_idx" in asked:
        said["seq_idx"] = _starts_of_numbers(asked["seq_idx"], shape)
    if positions is not None:
        said["position_ids"] = _starts_of_positions(positions, shape)
    if not said:
        raise InputError(f"{', '.join(asked)} alone does not say where sequences start: pass cu_seq_lens_q as well.")
    (first, starts), *others = said.items()
    for name, other in others:
        if not torch.equal(starts, other):
            row, token = (starts != other).nonzero()[0].tolist()
            which, whose = (first, name) if bool(starts[row, token]) else (name, first)
            raise InputError(
                f"{which} starts a sequence at token {token} of row {row}, and {whose} does not. {_AGREE} {PACKED}"
            )
    if not bool(starts[:, 1:].any()):
        return None
    borders = torch.cat([starts.flatten().nonzero().squeeze(-1), torch.tensor([starts.numel()], device="cpu")])
    longest = int(borders.diff().max())
    for name in LONGEST:
        if name in asked and int(asked[name]) < longest:
            raise InputError(f"{name} must be at least {longest}, the longest sequence; got {int(asked[name])}.")
    return Sequences(shape, borders)


def _starts_of_borders(name: str, borders: Any, shape: tuple[int, int]) -> Tensor:
    total = shape[0] * shape[1]
    is_list = isinstance(borders, Tensor) and borders.ndim == 1 and not borders.is_floating_point()
    numbers = borders.to("cpu", torch.int64) if is_list else torch.zeros(2, device="cpu")
    is_whole = numbers.numel() > 1 and [int(numbers[0]), int(numbers[-1])] == [0, total]
    if shape[0] != 1 or not is_whole or bool(numbers.diff().lt(0).any()):
        raise InputError(
            f"{name} must start at 0, never fall and end at the {total} tokens of the one row; got"
            f" {numbers.tolist()[:16] if is_list else borders!r} for {shape[0]} rows."
        )
    starts = torch.zeros(shape, dtype=torch.bool, device="cpu")
    starts[0, numbers[numbers < total]] = True
    return starts


def _starts_of_numbers(numbers: Any, shape: tuple[int, int]) -> Tensor:
    if not isinstance(numbers, Tensor) or numbers.shape != shape:
        found = tuple(numbers.shape) if isinstance(numbers, Tensor) else repr(numbers)
        raise InputError(f"seq_idx must be [batch, tokens] = {list(shape)}, numbers of sequences; got {found}.")
    numbers = numbers.cpu()
    return _first_true(numbers != numbers.roll(1, -1))


def _starts_of_positions(positions: Tensor, shape: tuple[int, int]) -> Tensor:
    is_ordered(positions, None, shape[1])  # or raises for another shape
    positions = positions.cpu()
    return _first_true(positions != positions.roll(1, -1) + 1).expand(shape[0], -1)


def _first_true(starts: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(starts[:, :1]), starts[:, 1:]], dim=1)


# -- values that are not there ---------------------------------------------------------------------------------------
def _traced(
    asked: Mapping[str, Any], made: TokenMask | None, positions: Tensor | None, query: Tensor, shape: tuple[int, int]
) -> tuple[Sequences | None, Tensor]:
    """The sequences that `cu_seq_lens` says; the graph checks that the others agree."""
    borders = next((asked[name] for name in BORDERS if name in asked), None)
    longest = next((asked[name] for name in LONGEST if name in asked), None)
    if borders is None or longest is None or isinstance(longest, (Tensor, float)) or torch.jit.is_tracing():
        raise InputError(f"{TRACED} Got {', '.join(sorted(asked))}.")
    if shape[0] != 1 or not isinstance(borders, Tensor) or borders.ndim != 1:
        raise InputError(f"cu_seq_lens_q must be [sequences + 1], for one row; got {shape[0]} rows.")
    place = torch.arange(shape[1], device=query.device)
    borders = borders.to(query.device)
    # The start of the sequence of every token: the last border that is not above it.
    start = borders[(torch.searchsorted(borders, place.to(borders.dtype), right=True) - 1).clamp_min(0)].long()
    starts = start == place
    conditions = [(asked["cu_seq_lens_k"].to(borders) == borders).all()] if "cu_seq_lens_k" in asked else []
    if positions is not None:
        conditions.append((_after(positions != positions.roll(1, -1) + 1) == starts).all())
    if "seq_idx" in asked:
        numbers = asked["seq_idx"].to(query.device)
        conditions.append((_after(numbers != numbers.roll(1, -1)) == starts).all())
    if made is not None and made.mask_function is not None:
        conditions.append(made.mask_function.shows(start[None]))
    for condition in conditions:
        query = require(query, condition, _DISAGREES)
    return Sequences(shape, borders, longest=longest), query


def _after(starts: Tensor) -> Tensor:
    return (torch.arange(starts.shape[-1], device=starts.device) == 0) | starts
