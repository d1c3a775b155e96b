"""A layer's attention for groups of rows (`ops/row_groups.py`), in place of the batch as it came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..ops.row_groups import RowGroups
from .contract import AttentionInputs


def by_groups(compute: Callable[[AttentionInputs], Tensor], inputs: AttentionInputs, rows: RowGroups) -> Tensor:
    """The output of a batch whose sequences are in groups, 0 for tokens that are in none.

    Args:
        compute: From a call to its output. Called once a group, with padded rows whose real tokens stand first.
    """
    outputs = []
    tokens = (rows.split(inputs.query), rows.split(inputs.key), rows.split(inputs.value))
    for group, query, key, value in zip(rows.groups, *tokens, strict=True):
        noise = None if inputs.noise is None else inputs.noise.of_rows(group.sequences)
        own = replace(inputs, query=query, key=key, value=value, key_mask=group.real, noise=noise)
        outputs.append(compute(replace(own, rows=None, real_first=True, shortest=group.shortest)))
    return rows.join(outputs)
