"""EVA with every convention of the published code against numbers from it (see `tests/golden/README.md`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from hf_linattn.functional import eva_attention
from hf_linattn.modules.base import LayerShape
from hf_linattn.modules.eva import EvaAttention, EvaConfig
from hf_linattn.modules.proposals import proposal_map
from hf_linattn.ops.relative_position import t5_index, t5_sizes, table_index

FILE = Path(__file__).parents[1] / "golden" / "eva.safetensors"
PUBLISHED = {"overlap_window": True, "chunking": "published", "weighting": "none", "noise_scale": "published"}
CASES: dict[str, dict[str, Any]] = {
    "sequence": {"window_size": 5, "num_chunks": 5, "proposals": "mean"},
    "grid": {"window_size": 2, "num_chunks": 4, "proposals": "mean"},
    "causal": {"window_size": 8, "chunk_size": 8, "proposals": "sum"},
}
GRID = (6, 6)


def load(case: str) -> dict[str, Tensor]:
    tensors = load_file(FILE)
    return {name.removeprefix(f"{case}."): z.double() for name, z in tensors.items() if name.startswith(f"{case}.")}


def window_bias(case: str, table: Tensor) -> Tensor:
    if case == "causal":
        buckets, distance = t5_sizes(8, 8)
        index = t5_index(8, 8, 0, num_buckets=buckets, max_distance=distance, is_causal=True, convention="published")
        return table[:, index] * 8**-0.5
    window, reach = (5, 2) if case == "sequence" else (2, 1)
    return table[:, table_index(window, reach, reach, is_grid=case == "grid", convention="published")]


def assert_same(ours: Tensor, expected: Tensor) -> None:
    error = float((ours - expected).detach().norm() / expected.norm())
    assert error < 1e-6, f"relative error {error:.1e}"  # the numbers are stored in float32


def attention(case: str, data: dict[str, Tensor], **options: Any) -> Tensor:
    return eva_attention(
        *(data[name] for name in ("query", "key", "value")),
        is_causal=case == "causal",
        grid=GRID if case == "grid" else None,
        query_map=proposal_map(data, "query"),
        key_map=proposal_map(data, "key"),
        window_bias=window_bias(case, data["relative_table"]),
        **{**PUBLISHED, **CASES[case], **options},
    )


@pytest.mark.parametrize("case", CASES)
def test_functions(case: str) -> None:
    data = load(case)
    assert_same(attention(case, data), data["out"])


def test_noise() -> None:
    data = load("causal")
    assert_same(attention("causal", data, noise=data["noise"]), data["out_with_noise"])


@pytest.mark.parametrize("case", CASES)
def test_a_layer_with_published_conventions(case: str) -> None:
    data = load(case)
    fields = {
        "proposals": CASES[case]["proposals"],
        "window_size": CASES[case]["window_size"],
        "chunk_size": CASES[case].get("chunk_size"),
        "num_chunks": CASES[case].get("num_chunks", 1),
        "proposal_map": "linear" if case == "causal" else "linear_norm",
        "relative_position": "t5" if case == "causal" else "table",
        "relative_dims": 2 if case == "grid" else 1,
    }
    config = EvaConfig(conventions="published", overlap_window=True, num_global_tokens=0, **fields)
    layer = EvaAttention(config, LayerShape(num_heads=1, head_dim=8, is_causal=case == "causal")).double().eval()
    layer.load_state_dict({name: data[name] for name in layer.state_dict()})
    ours = layer(*(data[name] for name in ("query", "key", "value")), grid=GRID if case == "grid" else None)
    assert_same(ours, data["out"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "change",
    [{"weighting": "size"}, {"proposals": "key"}, {"overlap_window": False, "window_bias": None}, {"query_map": None}],
)
def test_each_convention_matters(case: str, change: dict[str, Any]) -> None:
    data = load(case)
    options = {**PUBLISHED, **CASES[case], "query_map": proposal_map(data, "query"), **change}
    ours = eva_attention(
        *(data[name] for name in ("query", "key", "value")),
        is_causal=case == "causal",
        grid=GRID if case == "grid" else None,
        key_map=proposal_map(data, "key"),
        **{"window_bias": window_bias(case, data["relative_table"]), **options},
    )
    assert float((ours - data["out"]).norm() / data["out"].norm()) > 1e-3
