"""The scripts about generation: that they see what they are there to see. On tiny models."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
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

FOLDER = Path(__file__).resolve().parents[2] / "experiments"
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory as Linux tells it")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts() -> Any:
    """Both scripts, and what they share."""
    names = ("causal_lm", "stream", "generation_fidelity")
    assert not set(names) & set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: script(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


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


# -- what they share --------------------------------------------------------------------------------------------------
def test_settings_text_and_models(scripts: Any, tmp_path: Path) -> None:
    shared = scripts.causal_lm
    assert {shared.settings(kind).kind for kind in shared.KINDS} == set(list_kinds())
    assert shared.settings("eva-bounded", 7).max_chunks == 7
    assert set(shared.KINDS) - set(shared.CONSTANT) == {"eva"}
    assert shared.load(None, layers=1, positions=50).config.n_positions == 50
    (tmp_path / "a.txt").write_text("c", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a\n", "b"]}), tmp_path / "b.parquet")
    letters = lambda text, **_: {"input_ids": [ord(letter) for letter in text]}  # noqa: E731
    assert shared.tokens(letters, [tmp_path / "a.txt", tmp_path / "b.parquet"]).tolist() == [99, 97, 10, 98]
    assert shared.windows(tokens(23), 5, 3).shape == (3, 5)
    with pytest.raises(SystemExit, match="4 tokens; at least 5"):
        shared.windows(tokens(4), 5)


# -- stream -----------------------------------------------------------------------------------------------------------
@linux
def test_a_stream_is_scored_as_a_whole_text_is(scripts: Any) -> None:
    model, ids = gpt2(), tokens(50)
    cache = DynamicCache(config=model.config)
    samples = scripts.stream.score(model, cache, ids, 17)
    assert [sample.tokens for sample in samples] == [17, 34, 50]
    counts = (16, 17, 16)  # the first token has no loss
    mean = sum(sample.loss * count for sample, count in zip(samples, counts, strict=True)) / 49
    with torch.no_grad():
        assert mean == pytest.approx(float(model(ids[None], labels=ids[None]).loss), rel=1e-5)
    assert samples[-1].cache == 2 * 2 * 50 * 16 * 4
    more = scripts.stream.generate(model, cache, 7, 50, 3)
    assert [sample.tokens for sample in more] == [53, 56, 57]
    assert cache.get_seq_length() == 57
    assert all(sample.resident > 0 and sample.peak > 0 for sample in samples + more)
    assert len(scripts.stream.lines(samples + more)) == 6


def test_growth_counts_from_the_start_given(scripts: Any) -> None:
    """What comes before is warm-up; one sample that is off does not count, but any growth of the cache does."""
    blank = scripts.stream.Sample(0, 100 * MIB, 200 * MIB, 1000, 0.1)
    flat = [replace(blank, tokens=n) for n in range(1, 101)]
    flat[3] = replace(flat[3], resident=0)  # before the start
    flat[50] = replace(flat[50], resident=900 * MIB)
    flat[99] = replace(flat[99], resident=900 * MIB)
    assert scripts.stream.growth(flat, 10) == {"resident": 0, "peak": 0, "cache": 0}
    leak = [replace(s, resident=s.resident + s.tokens * MIB, peak=s.peak + s.tokens * MIB // 2) for s in flat]
    found = scripts.stream.growth(leak, 10)
    assert found["resident"] / MIB == pytest.approx(80, abs=3)
    assert found["peak"] / MIB == pytest.approx(40, abs=2)
    late = [*flat[:-1], replace(flat[-1], cache=1001)]
    assert scripts.stream.growth(late, 10)["cache"] == 1
    filling = [replace(s, cache=1000 + s.tokens % 8) for s in flat]  # of windows of 8 tokens; 100 is not full of them
    assert scripts.stream.growth(filling, 10, 8)["cache"] == 0
    filling[-1] = replace(filling[-1], cache=filling[-1].cache + 1)
    assert scripts.stream.growth(filling, 10, 8)["cache"] == 1
    assert scripts.stream.growth(flat[:1], 10) == {"resident": 0, "peak": 0, "cache": 0}


@pytest.mark.parametrize(
    ("found", "number"),
    [
        ({"resident": 4 * MIB, "peak": -5, "cache": 0}, 0),
        ({"resident": 5 * MIB, "peak": 5 * MIB, "cache": 1}, 3),
        ({"resident": 0, "peak": 0, "cache": 1}, 1),
    ],
)
def test_only_a_constant_state_can_fail(scripts: Any, found: dict[str, int], number: int) -> None:
    assert len(scripts.stream.failures("lara", found, 4.0)) == number
    assert len(scripts.stream.failures("eva-bounded", found, 4.0)) == number
    assert scripts.stream.failures("eva", found, 4.0) == scripts.stream.failures("softmax", found, 4.0) == []


@linux
@pytest.mark.parametrize("kind", ["softmax", "favor_sharp", "eva-bounded"])
def test_the_script_about_streams(scripts: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.causal_lm, "load", lambda path, layers, positions: gpt2(n_positions=positions))
    monkeypatch.setattr(scripts.causal_lm, "settings", small)
    grown = {"resident": 0, "peak": 0, "cache": 7}
    monkeypatch.setattr(scripts.stream, "growth", lambda samples, start, window: grown)
    app = typer.Typer()
    app.command()(scripts.stream.main)
    arguments = ["--kind", kind, "--tokens", "64", "--piece", "24", "--generate", "5", "--max-chunks", "4"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out.json")])
    assert result.exit_code == (0 if kind == "softmax" else 1), result.output
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(content["failures"]) == (0 if kind == "softmax" else 2)
    assert {name: samples[-1]["tokens"] for name, samples in content["samples"].items()} == {
        "scored in pieces": 64,
        "token by token": 69,
    }
    wrong = CliRunner().invoke(app, ["--kind", "favour"])
    assert wrong.exit_code == 2


# -- fidelity ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("total", [1, 5, 1024])
def test_pieces_of_a_generation_run(scripts: Any, total: int) -> None:
    found = scripts.generation_fidelity.pieces(total, torch.Generator().manual_seed(0))
    assert sum(found) == total
    assert min(found) >= 1
    assert max(found) <= 300
    assert total < 1024 or (1 in found and len(found) > 4)


def test_recovery_lowers_the_loss(scripts: Any) -> None:
    text = torch.arange(1, 5).repeat(40)
    model = hf_linattn.convert(gpt2(), small("favor_plus"))
    before = float(model(text[None, :32], labels=text[None, :32]).loss.detach())
    after = scripts.generation_fidelity.recover(model, text, 30, batch=4, length=32)
    assert after < before - 0.2
    assert not model.training


def options(**changes: Any) -> dict[str, Any]:
    made = {"steps": 1, "batch": 2, "length": 24, "window": 40, "windows": 2, "single": 1, "prompts": 1}
    return {**made, "max_chunks": 4, "checkpoints": None, **changes}


@pytest.fixture
def fast(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fidelity = scripts.generation_fidelity
    monkeypatch.setattr(scripts.causal_lm, "settings", small)
    for name, value in (("PROMPT", 12), ("NEW", 6), ("LONGEST_PIECE", 15)):
        monkeypatch.setattr(fidelity, name, value)
    return fidelity


def test_one_row_per_kind(fast: ModuleType, tmp_path: Path) -> None:
    kinds = ["favor_plus", "lara"]
    measured = lambda kind: fast.measured(kind, gpt2(), tokens(400), tokens(100), options(checkpoints=tmp_path))  # noqa: E731
    rows = [measured(kind) for kind in ["softmax", *kinds]]
    assert [row["kind"] for row in rows] == ["softmax", *kinds]
    for row in rows:
        assert row["difference_in_pieces"] <= 1e-4
        assert row["difference_token_by_token"] <= 1e-4
        assert row["greedy_equal"] == [6]
        assert 0.8 < row["bfloat16_agreement"] <= 1
        assert len(fast.line(row)) == 8
        json.dumps(row)
    assert rows[0]["loss"] is None
    assert rows[1]["loss"] > 0
    again = measured("lara")
    assert again["loss"] is None  # nothing was trained
    assert again["perplexity"] == pytest.approx(rows[2]["perplexity"], rel=1e-6)


@torch.inference_mode()
def test_a_cache_that_forgets_is_seen(fast: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same script with logits that are off by a little, and with a cache without its first token."""
    model, rows = gpt2(), tokens(2, 40)
    right = fast.perplexities(model, rows, 1)
    good = {**right, "bfloat16_agreement": 1.0, "greedy_equal": [6], "greedy_tokens": 6}
    assert fast.failures(good) == []
    bad = {"bfloat16_agreement": 0.98, "greedy_equal": [5], "difference_in_pieces": float("nan")}
    for name, value in bad.items():
        (only,) = fast.failures({**good, name: value})
        assert name.split("_")[0] in only
    read = fast.read

    def forgetful(model: Any, row: Tensor, sizes: list[int] | None = None) -> Tensor:
        return read(model, row if sizes is None else torch.cat([row[:1], row[:1], row[2:]]), sizes)

    monkeypatch.setattr(fast, "read", forgetful)
    assert len(fast.failures({**good, **fast.perplexities(model, rows, 1)})) == 2
    assert fast.agreement(gpt2().to(torch.bfloat16), rows)["bfloat16_agreement"] < 0.99


def test_greedy_counts_up_to_the_first_other_token(fast: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generate = gpt2(), GPT2LMHeadModel.generate

    def off(self: Any, prompt: Tensor, *, use_cache: bool, **rest: Any) -> Tensor:
        out = generate(self, prompt, use_cache=use_cache, **rest)
        if use_cache:
            out[0, fast.PROMPT + 2] += 1
        return out

    found = fast.greedy(model, tokens(1, 20))
    assert (found["greedy_equal"], found["greedy_tokens"]) == ([6], 6)
    assert 1 <= found["greedy_distinct"][0] <= 6
    monkeypatch.setattr(GPT2LMHeadModel, "generate", off)
    assert fast.greedy(model, tokens(1, 20))["greedy_equal"] == [2]
