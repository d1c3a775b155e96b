"""The published implementations' numbers, through the public functions and the layers (`tests/golden/README.md`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_adapter import run_case
from safetensors.torch import load_file
from torch import Tensor

from hf_linattn.modules.base import LayerShape
from hf_linattn.modules.kinds.eva import EvaAttention, EvaConfig
from hf_linattn.modules.kinds.lara import LaraAttention, LaraConfig

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text())
ANSWERS = ("out", "dq", "dk", "dv")


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, and the stored answers by `<variant>.<part>`."""
    inputs, answers = {}, {}
    for key, tensor in load_file(GOLDEN / f"{name}.safetensors").items():
        plain = key.removesuffix("_exact")
        is_answer = plain.rpartition(".")[2] in ANSWERS
        (answers if is_answer else inputs)[plain if is_answer else key] = tensor
    return inputs, answers


def error(ours: Tensor, expected: Tensor) -> float:
    assert ours.dtype == expected.dtype == torch.float64
    return float((ours - expected).detach().norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name in CASES for variant in CASES[name]["variants"]]
)
def test_golden_vectors(name: str, variant: str) -> None:
    """The adapter is given no answers, so it cannot read them."""
    inputs, answers = load(name)
    ours = run_case(CASES[name], inputs, variant)
    expected = {key: tensor for key, tensor in answers.items() if key.startswith(f"{variant}.")}
    assert f"{variant}.out" in expected
    for key, tensor in expected.items():
        assert error(ours[key.removeprefix(f"{variant}.")], tensor) < 1e-10, key


def test_every_answer_is_compared() -> None:
    mechanisms = set()
    for name, case in CASES.items():
        _, answers = load(name)
        assert {key.partition(".")[0] for key in answers} == set(case["variants"]), name
        for variant, info in case["variants"].items():
            assert info["gradients"] == any(f"{variant}.{part}" in answers for part in ANSWERS[1:]), (name, variant)
        mechanisms.add(case["mechanism"])
    assert mechanisms == {
        *("favor_noncausal", "favor_causal", "ra", "lara_1d", "lara_2d", "eva_1d", "eva_2d", "causal_eva")
    }
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == set(CASES)


def test_stored_answers_are_not_read() -> None:
    name, variant = "causal_eva_overlap_ragged", "eval"
    inputs, answers = load(name)
    expected = run_case(CASES[name], inputs, variant)
    wrong = {key: torch.full_like(tensor, float("nan")) for key, tensor in answers.items()}
    ours = run_case(CASES[name], {**inputs, **wrong}, variant)
    assert all(torch.equal(ours[part], expected[part]) for part in ANSWERS)


@pytest.mark.parametrize(
    ("name", "variant", "change"),
    [
        ("favor_causal_growing_keys", "eval", {"causal": False}),
        ("ra_mean_mixture", "train", {"num_samples": 0}),
        ("lara1d_opt_clamp", "eval", {"alpha_coeff": 1.0}),
        ("lara1d_opt_clamp", "eval", {"mis_type": "mis-bh"}),
        ("lara1d_opt_antithetic", "train", {"use_antithetics": False}),
        ("lara1d_biased_multisample", "eval", {"mis_type": "mis-bh"}),
        ("lara2d_noparam_bh_ragged", "eval", {"H": 7, "W": 5}),
        ("lara2d_noparam_vmixed", "eval", {"proposal_gen": "no-param-pool-mixed"}),
        ("lara2d_dense_poolmixed", "train", {"proposal_gen": "pool"}),
        ("eva1d_overlap_ragged", "eval", {"overlap_window": False}),
        ("eva1d_none_rpe", "eval", {"use_rpe": False}),
        ("eva1d_noln_t5_overlap", "eval", {"use_t5_rpe": False}),
        ("eva2d_overlap_rpe", "eval", {"use_rpe": False}),
        ("causal_eva_overlap_ragged", "eval", {"chunk_size": 8}),
        ("causal_eva_num_chunks", "eval", {"num_chunks": 8}),
    ],
    ids=str,
)
def test_each_setting_matters(name: str, variant: str, change: dict[str, Any]) -> None:
    inputs, answers = load(name)
    case = {**CASES[name], "settings": {**CASES[name]["settings"], **change}, "variants": {variant: {}}}
    assert error(run_case(case, inputs, variant)["out"], answers[f"{variant}.out"]) > 1e-3


# -- layers ---------------------------------------------------------------------------------------------------------
def layer_state(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published parameters by the names of a layer's."""
    sides = {"q_bar_gen": "query", "k_bar_gen": "key", "adaptive_mu_q": "query", "adaptive_mu_k": "key"}
    state = {}
    for key, tensor in inputs.items():
        if not key.startswith("param."):
            continue
        module, *rest = key.split(".")[1:]
        if module in sides:
            name = "_".join(rest).replace("linear", "map")
            state[f"{sides[module]}_{name}"] = tensor
        else:  # [entries, heads], or of a 1-D window [heads, queries, slots]
            state["relative_table"] = tensor.flatten(1) if tensor.ndim == 3 else tensor.T
    return state


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("lara1d_opt_clamp", LaraConfig(num_landmarks=12, alpha_coeff=8.0)),
        ("lara2d_noparam_bh_ragged", LaraConfig(num_landmarks=9, proposal_map="none", weighting="balance")),
        (
            "eva1d_none_rpe",
            EvaConfig(window_size=4, num_chunks=6, proposals="none", relative_position="table", relative_dims=1),
        ),
        (
            "eva1d_overlap_ragged",
            EvaConfig(window_size=4, num_chunks=8, overlap_window=True),
        ),
        (
            "eva2d_overlap_rpe",
            EvaConfig(window_size=2, num_chunks=4, overlap_window=True, relative_position="table", relative_dims=2),
        ),
        ("causal_eva_t5", EvaConfig(window_size=16, chunk_size=8, relative_position="t5")),
        ("causal_eva_overlap_ragged", EvaConfig(window_size=8, chunk_size=4, overlap_window=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_with_published_conventions(name: str, config: LaraConfig | EvaConfig) -> None:
    inputs, answers = load(name)
    settings = CASES[name]["settings"]
    cls = EvaAttention if isinstance(config, EvaConfig) else LaraAttention
    heads, dim = inputs["q"].shape[1], inputs["q"].shape[3]
    config = config.replace(conventions="published", num_global_tokens=0)
    layer = cls(config, LayerShape(heads, dim, is_causal=bool(settings.get("causal")))).double().eval()
    layer.load_state_dict(layer_state(inputs))
    grid = (settings["H"], settings["W"]) if "H" in settings else None
    ours = layer(*(inputs[key] for key in ("q", "k", "v")), grid=grid)
    assert error(ours, answers["eval.out"]) < 1e-10


def test_the_files_stay_small() -> None:
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 250_000
