"""The experiments of the papers measure what they say, and docs/papers.md says what they measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from cases import GPT2
from torch import Tensor
from typer.testing import CliRunner

from hf_linattn import functional

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "papers"))


def script(name: str) -> Any:
    return importlib.import_module(name)


# -- every script, small --------------------------------------------------------------------------------------------
SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments, and constants of the script
    "favor_plus_error": ({"seeds": 2, "tokens": 32, "draws": 20}, {"COUNTS": (4, 8), "COSINES": (-1.0, -0.5, 0.0)}),
    "attention_kernels": (
        {"seeds": 2, "steps": 4, "features": 4},
        {"KERNELS": ("relu", "exp"), "ATTENTIONS": ("softmax", "FAVOR+", "relu", "exp", "uniform"), "TRAIN": 1780},
    ),
    "favor_sharp_variance": (
        {"seeds": 2, "vectors": 80, "draws": 100, "tokens": 40, "rows": 2},
        {"SIZES": (0.1, 0.2)},
    ),
    "kernel_classification": ({"seeds": 2, "features": 8}, {"SHIPPED": ("iris",), "SIGMAS": (0.1, 1.0)}),
    "randomized_bias": ({"seeds": 2, "draws": 3, "tokens": 16, "layers": "1"}, {"SAMPLES": (2, 4)}),
    "control_variates": (
        {"seeds": 1, "tokens": 32, "rows": 2},
        {"CHUNKS": (2, 8), "WINDOWS": (4, 8), "GROUPS": (1, 4)},
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_script_writes_its_claims(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, constants = SMALL[name]
    for constant, value in constants.items():
        monkeypatch.setattr(script(name), constant, value)
    out = tmp_path / "new" / "result.json"
    script(name).main(**arguments, out=out)
    found = json.loads(out.read_text())
    assert found["claims"]
    assert all(set(claim) == {"source", "claim", "figure", "agrees"} for claim in found["claims"])
    assert all("nan" not in claim["figure"] for claim in found["claims"])
    assert {"mean", "error"} in [set(v) for row in found["rows"] for v in row.values() if isinstance(v, dict)]


@pytest.mark.parametrize("name", [*SMALL, "papers_table"])
def test_script_has_help(name: str) -> None:
    app = typer.Typer()
    app.command()(script(name).main)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "--out" in result.output or name == "papers_table"


def test_all_experiments_are_in_the_table() -> None:
    assert set(script("papers_table").EXPERIMENTS) == set(SMALL)


def test_the_page_is_what_the_results_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    papers_table = script("papers_table")
    papers_table.main(check=True)
    page = tmp_path / "papers.md"
    page.write_text(papers_table.PAGE.read_text().replace("**yes**", "**no**", 1))
    monkeypatch.setattr(papers_table, "PAGE", page)
    with pytest.raises(SystemExit, match="2"):
        papers_table.main(check=True)
    assert capsys.readouterr().err == "error: docs/papers.md is not what the results say: run papers_table.py\n"
    papers_table.main()
    papers_table.main(check=True)


# -- judgement ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("less", "more", "answer"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 2.0], "yes"),
        ([2.0, 2.1, 2.0], [1.0, 1.1, 0.9], "no"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], "undecided"),
        ([1.0, 1.0], [1.0, 1.0], "undecided"),
        ([1.0, 5.0, 9.0], [1.1, 5.1, 9.1], "yes"),  # in pairs
    ],
)
def test_below(less: list[float], more: list[float], answer: str) -> None:
    assert script("paper_tools").below(less, more) == answer


def test_claims_count_their_comparisons() -> None:
    judged = script("paper_tools").Claim.judged
    assert judged("", "", "", ["yes", "yes"]).agrees == "yes"
    assert judged("", "", "", ["undecided", "yes", "no", "yes"]).agrees == "2 yes, 1 no, 1 undecided"


def test_estimates_show_as_many_digits_as_they_have() -> None:
    estimate = script("paper_tools").Estimate
    assert str(estimate(12.3456, 0.21)) == "12.3 ± 0.2"
    assert str(estimate(0.001234, 0.0002)) == "0.00123 ± 0.00020"
    assert str(estimate(1234.5, 30.0)) == "1234 ± 30"


# -- FAVOR# ---------------------------------------------------------------------------------------------------------
def test_variance_of_trigonometric_features() -> None:
    variance = script("favor_sharp_variance")
    x, y = variance.normal(3, 0.2, torch.Generator().manual_seed(0))
    w = functional.draw_projection(None, 200_000, variance.DIM, seed=1, orthogonal=False).double()
    norms = (x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :]) / 2 - x @ y.mT
    features = norms.exp().unsqueeze(-1) * ((x.unsqueeze(-2) - y.unsqueeze(-3)) @ w.mT).cos()
    assert float(features.var(-1).log().mean()) == pytest.approx(
        float(variance.log_variance("TrigRF", x, y)), abs=0.02
    )


def test_predicted_variance_is_that_of_drawn_features() -> None:
    assert abs(script("favor_sharp_variance").closed_form(100, 2, 20_000).mean) < 0.1


def test_random_features_classify_as_their_kernel() -> None:
    classification = script("kernel_classification")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 3, generator=generator).double().div(2).split([20, 30])
    classes = torch.nn.functional.one_hot(torch.bucketize(y[:, 0].float(), torch.tensor([-0.3, 0.3]))).double()
    w = functional.draw_projection(None, 60_000, 3, seed=1).double()
    shares = {method: classification.scores(method, x, y, classes, w) for method in classification.METHODS}
    for method, found in shares.items():
        assert found.shape == (20, 3)
        assert torch.allclose(found / found.sum(-1, keepdim=True), shares["exact kernel"], atol=0.03), method


def test_tables_are_read_as_the_uci_writes_them(tmp_path: Path) -> None:
    rows = "".join(f"NAME{n}, {n}.5, {'MFI'[n % 3]}, yes\nNAME{n}b, {n}, F, no\n" for n in range(20))
    (tmp_path / "t.data").write_text(rows)
    table = script("kernel_classification").read_csv(tmp_path / "t.data", -1)
    assert table.points.shape == (40, 4)  # the number, and three letters; no names
    assert table.classes.tolist() == [1, 0] * 20
    train, validation, test = script("kernel_classification").split(table, 0)
    assert [len(part.points) for part in (train, validation, test)] == [32, 4, 4]
    assert torch.allclose(train.points.mean(0), torch.zeros(4).double(), atol=1e-9)


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ("1,2\n" * 10, -1, "must have at least 30 rows"),
        ("1,2\n" * 40, 7, "a column 7"),
        ("".join(f"{n},{n}\n" for n in range(40)), -1, "must be a class"),
        ("1,2\n1,2,3\n", -1, "is no table"),
        ("size,class\n" + "1.5,a\n2.5,b\n" * 20, -1, "begins with names"),
    ],
)
def test_tables_that_are_none(text: str, label: int, message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "t.data").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        script("kernel_classification").read_csv(tmp_path / "t.data", label)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


# -- LARA, EVA, kernels ---------------------------------------------------------------------------------------------
def test_bias_is_told_from_spread() -> None:
    exact = torch.ones(2, 2000, 3)
    noise = torch.randn(2, 5, 2000, 3, generator=torch.Generator().manual_seed(0))
    for offset in (0.0, 0.5):
        bias, error = script("randomized_bias").bias_and_error(exact.unsqueeze(1) + offset + noise, exact)
        assert float(bias) == pytest.approx(offset**2, abs=0.02)
        assert float(error) == pytest.approx(1 + offset**2, abs=0.02)


def inputs(tokens: int = 16) -> Any:
    draws = torch.randn(3, 2, 3, tokens, 4, generator=torch.Generator().manual_seed(0))
    return script("paper_tools").AttentionInputs(*draws, 0.5)


def test_groups_go_from_one_feature_to_softmax() -> None:
    variates = script("control_variates")
    found = inputs()
    exact: Tensor = functional.softmax_attention(*found[:3], scaling=found.scaling)
    assert torch.allclose(variates.grouped_attention(found, 16), exact, atol=1e-5)
    assert torch.allclose(variates.grouped_attention(found, 1), variates.one_feature(found), atol=1e-5)


def test_real_inputs_are_those_of_every_layer() -> None:
    layers = script("paper_tools").attention_of_text(None, None, 20, 2)
    assert len(layers) == 6
    assert layers[0].query.shape == layers[5].value.shape == (2, 12, 20, 32)
    assert layers[0].scaling == pytest.approx(32**-0.5)


@pytest.mark.parametrize(("tokens", "rows"), [(9999, 2), (500, 999)])
def test_too_much_text_is_refused(tokens: int, rows: int, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        script("paper_tools").attention_of_text(None, None, tokens, rows)
    assert capsys.readouterr().err.startswith("error: --")


def test_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(script("shared"), "encoder", lambda path: (GPT2.build(), None))
    with pytest.raises(SystemExit, match="2"):
        script("paper_tools").attention_of_text(tmp_path, None, 16, 2)
    assert capsys.readouterr().err == "error: --model must be a BERT checkpoint; got one of the type 'gpt2'.\n"


@pytest.mark.parametrize("layers", ["", "6", "1,a"])
def test_layers_that_there_are_not(layers: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        script("paper_tools").numbers(layers, "--layers", 6)
    assert capsys.readouterr().err.startswith("error: --layers must be numbers from 0 to 5")


def test_the_control_reads_everything_alike() -> None:
    kernels = script("attention_kernels")
    layer = kernels.build(kernels.UNIFORM, 4, 0).transformer.h[0].attn.linattn
    query, key, value = torch.randn(3, 1, 2, 10, 32)
    expected = value.cumsum(2) / torch.arange(1, 11).view(1, 1, 10, 1)
    assert torch.allclose(layer(query, key, value), expected, atol=1e-4)
