"""The scripts about generation: that they see what they are there to see. On tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import typer
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import hf_linattn
from hf_linattn import EvaConfig, FavorPlusConfig, FavorSharpConfig, LaraConfig
from hf_linattn.modules.registry import list_kinds

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory as Linux tells it")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both scripts, and what they share, with small sizes."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "experiments"))
    import generation_fidelity
    import shared
    import stream

    monkeypatch.setattr(shared, "causal_settings", small)
    monkeypatch.setattr(shared, "decoder", lambda path, positions: gpt2(n_positions=positions))
    for name, value in {"PROMPT": 12, "NEW": 6, "PIECES": (9, 1, 4), "BATCH": 4, "LENGTH": 32}.items():
        monkeypatch.setattr(generation_fidelity, name, value)
    return SimpleNamespace(shared=shared, stream=stream, generation_fidelity=generation_fidelity)


@pytest.fixture
def fidelity(scripts: Any) -> ModuleType:
    return scripts.generation_fidelity


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 512, "vocab_size": 40, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})).eval()


def tokens(*size: int) -> Tensor:
    return torch.randint(1, 40, size, generator=torch.Generator().manual_seed(0))


def small(kind: str, max_chunks: int = 4) -> Any:
    return {
        "favor_plus": FavorPlusConfig(num_features=8, window_size=8),
        "favor_sharp": FavorSharpConfig(num_features=8, window_size=8),
        "lara": LaraConfig(num_landmarks=4, window_size=8),
        "eva": EvaConfig(window_size=8, chunk_size=4),
        "eva-bounded": EvaConfig(window_size=8, chunk_size=4, max_chunks=max_chunks),
    }[kind]


def run(script: Any, *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# -- what they share --------------------------------------------------------------------------------------------------
def test_settings_text_and_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "experiments"))
    import shared

    assert set(shared.CAUSAL_KINDS) == {*list_kinds(), "eva-bounded"}
    assert shared.causal_settings("eva-bounded", 7).max_chunks == 7
    assert shared.causal_settings("lara", 7) == {"kind": "lara"}
    assert shared.decoder(None, positions=50).config.n_positions == 50
    (tmp_path / "a.txt").write_text("c", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a\n", "b"]}), tmp_path / "b.parquet")
    letters = lambda text, **_: {"input_ids": [ord(letter) for letter in text]}  # noqa: E731
    assert shared.read_tokens(letters, [tmp_path / "a.txt", tmp_path / "b.parquet"]).tolist() == [99, 97, 10, 98]
    assert shared.rows_of(tokens(23), 5, 3).shape == (3, 5)
    with pytest.raises(SystemExit, match="4 tokens; at least 5"):
        shared.rows_of(tokens(4), 5)


# -- stream -----------------------------------------------------------------------------------------------------------
@linux
def test_samples_of_a_stream(scripts: Any) -> None:
    model = gpt2()
    cache = DynamicCache(config=model.config)
    samples = scripts.stream.read(model, cache, tokens(50), 17, 17)
    assert [held for _, held in samples] == [2 * 2 * count * 16 * 4 for count in (17, 34, 50)]
    samples = scripts.stream.read(model, cache, tokens(7), 1, 3)
    assert [held for _, held in samples] == [2 * 2 * count * 16 * 4 for count in (53, 56)]
    assert cache.get_seq_length() == 57
    assert all(resident > 0 for resident, _ in samples)


def test_growth_counts_from_a_tenth_on(scripts: Any) -> None:
    """What comes before is warm-up; one sample that is off does not count, but any growth of the cache does."""
    growth = lambda samples: [scripts.stream.growth(samples)[f"{name} grew by"] for name in ("resident", "cache")]  # noqa: E731
    flat = [(100 * MIB, MIB)] * 100
    flat[3], flat[50], flat[99] = (0, MIB), (900 * MIB, MIB), (900 * MIB, MIB)
    assert growth(flat) == [0, 0]
    assert growth([(size + number * MIB, held) for number, (size, held) in enumerate(flat)]) == [pytest.approx(80), 0]
    assert growth([*flat[:-1], (0, 2 * MIB)])[1] == 1
    assert growth(flat[:1]) == [0, 0]


@pytest.mark.parametrize(("resident", "cache", "fails"), [(4.0, 0.0, False), (5.0, 0.0, True), (0.0, 1e-6, True)])
def test_only_a_constant_state_can_fail(scripts: Any, resident: float, cache: float, fails: bool) -> None:
    row = {"resident grew by": resident, "cache grew by": cache}
    for kind, can_fail in {"lara": True, "eva-bounded": True, "eva": False, "softmax": False}.items():
        assert scripts.stream.is_failure({"kind": kind, **row}, 4.0) == (fails and can_fail)


@linux
def test_the_script_about_streams(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def growth(samples: list[tuple[int, int]]) -> dict[str, int]:
        assert len(samples) in (4, 1, 8)  # pieces, windows, or tokens of softmax
        return {"resident grew by": 0, "cache grew by": 7}

    monkeypatch.setattr(scripts.stream, "growth", growth)
    out = tmp_path / "out.json"
    sizes = ["--tokens", 64, "--piece", 16, "--generate", 8, "--out", out]
    assert run(scripts.stream, *sizes, "--kinds", "softmax,favor_sharp,eva-bounded").exit_code == 1
    content = json.loads(out.read_text(encoding="utf-8"))
    assert len(content["rows"]) == 6
    assert [row["kind"] for row in content["failures"]] == ["favor_sharp"] * 2 + ["eva-bounded"] * 2
    assert run(scripts.stream, *sizes, "--kinds", "softmax").exit_code == 0
    assert "error: kinds" in str(run(scripts.stream, "--kinds", "favour").exception)


# -- fidelity ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("total", [1, 9, 10, 1024])
def test_pieces_of_a_text(fidelity: ModuleType, total: int) -> None:
    found = fidelity.pieces(total)
    assert sum(found) == total
    assert min(found) >= 1


def test_recovery_lowers_the_loss(fidelity: ModuleType) -> None:
    text = torch.arange(1, 5).repeat(40)
    model = hf_linattn.convert(gpt2(), small("favor_plus"))
    before = float(model(text[None, :32], labels=text[None, :32]).loss.detach())
    fidelity.recover(model, text, 30)
    assert float(model(text[None, :32], labels=text[None, :32]).loss.detach()) < before - 0.2
    assert not model.training


def test_rows_of_each_kind(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity, out = scripts.generation_fidelity, tmp_path / "out.json"
    monkeypatch.setattr(fidelity.transformers.AutoTokenizer, "from_pretrained", lambda path: None)
    monkeypatch.setattr(scripts.shared, "read_tokens", lambda tokenizer, paths: tokens(400))
    monkeypatch.setattr(fidelity, "AGREEMENT", 0.8)
    files = ["--model", tmp_path, "--train", tmp_path, "--eval", tmp_path, "--out", out]
    sizes = ["--steps", 1, "--window", 40, "--windows", 2, "--single", 1]
    result = run(fidelity, *files, *sizes, "--kinds", "favor_plus,lara")
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["kind"] for row in rows] == ["softmax"] * 4 + ["favor_plus"] * 4 + ["lara"] * 4
    assert not any(map(fidelity.is_failure, rows))
    monkeypatch.setattr(fidelity, "greedy", lambda model, prompts: 0.9)
    assert run(fidelity, *files, *sizes, "--kinds", "lara").exit_code == 1


@pytest.mark.parametrize(
    "row",
    [
        {"read": "in pieces", "difference": 2e-4, "same": 1.0},
        {"read": "token by token", "difference": float("nan"), "same": 1.0},
        {"read": "token by token, bfloat16", "difference": 0.0, "same": 0.98},
        {"read": "greedily", "same": 0.999},
    ],
)
def test_what_fails(fidelity: ModuleType, row: dict[str, Any]) -> None:
    assert fidelity.is_failure(row)
    assert not fidelity.is_failure({**row, "difference": 0.0, "same": 1.0})


@torch.inference_mode()
def test_a_cache_that_forgets_is_seen(fidelity: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, read = gpt2(), tokens(2, 40), fidelity.read
    right = fidelity.through_cache(model, rows, [40])
    assert right["difference"] < 1e-4
    assert right["same"] == 1
    assert right["perplexity"] == pytest.approx(float(model(rows, labels=rows).loss.exp()), rel=1e-5)

    def forgetful(model: Any, row: Tensor, sizes: list[int] | None = None) -> Tensor:
        return read(model, row if sizes is None else torch.cat([row[:1], row[:1], row[2:]]), sizes)

    monkeypatch.setattr(fidelity, "read", forgetful)
    wrong = fidelity.through_cache(model, rows, [40])
    assert wrong["difference"] > 1e-4
    assert wrong["same"] < 0.99


@torch.inference_mode()
def test_greedy_counts_up_to_the_first_other_token(fidelity: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generate, prompts = gpt2(), GPT2LMHeadModel.generate, tokens(1, 12)

    def off(self: Any, prompt: Tensor, *, use_cache: bool, **rest: Any) -> Tensor:
        out = generate(self, prompt, use_cache=use_cache, **rest)
        if use_cache:
            out[0, 12 + 2] += 1
        return out

    assert fidelity.greedy(model, prompts) == 1
    monkeypatch.setattr(GPT2LMHeadModel, "generate", off)
    assert fidelity.greedy(model, prompts) == pytest.approx(2 / 6)
