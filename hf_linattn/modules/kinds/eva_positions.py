"""Learned biases of relative positions in EVA's windows.

`config` is an `EvaConfig`, whose file imports this one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import InputError
from ...ops.eva.layout import nominal_reach
from ...ops.eva.relative_position import constant_index, t5_sizes, table_size


def _position_options(config: Any, is_causal: bool) -> dict[str, Any]:
    """Arguments of `table_size`, `table_index` and `t5_index`: a window with its bounds, how positions count."""
    window, reach = config.window_size or 1, 0
    if config.overlap_window:
        reach = nominal_reach(window, config.chunking or "exclusive", is_causal)
    options: dict[str, Any] = {"window_size": window, "left": reach, "right": 0 if is_causal else reach}
    options |= {"is_grid": config.relative_dims == 2, "convention": config.relative_index or config.conventions}
    if config.relative_position == "t5":
        buckets, distance = t5_sizes(window, reach)
        options |= {"num_buckets": buckets, "max_distance": distance, "is_causal": is_causal}
    return options


def table_entries(config: Any, is_causal: bool) -> int:
    """Entries of a head's table."""
    options = _position_options(config, is_causal)
    if config.relative_position == "t5":
        is_squared = options["is_grid"] and options["convention"] == "corrected"
        return int(options["num_buckets"] ** (2 if is_squared else 1))
    return table_size(**options)


def window_bias(
    config: Any, table: Tensor, grid: tuple[int, int] | None, scaling: float, *, is_causal: bool
) -> Tensor:
    """`[heads, queries, slots]` from the learned table."""
    dims = 1 if grid is None else 2
    if dims != (config.relative_dims or 1):
        raise InputError(
            f"This layer's relative positions are those of {config.relative_dims or 1} dimension(s); got"
            f" grid={grid!r}. Set EvaConfig.relative_dims={dims} when converting. (An image has a grid only if"
            f" num_global_tokens, here {config.num_global_tokens}, is the number of tokens before its patches.)"
        )
    options, kind = _position_options(config, is_causal), config.relative_position
    bias = table[:, constant_index(kind, device=str(table.device), **options)]
    return bias * scaling if kind == "t5" and options["convention"] == "published" else bias
