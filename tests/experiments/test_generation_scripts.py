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
def test_samples_of_a_stream(scripts: Any) -> None:
    model, ids = gpt2(), tokens(50)
    cache = DynamicCache(config=model.config)
    samples = scripts.stream.read(model, cache, ids, 17, 17)
    assert [sample["tokens"] for sample in samples] == [17, 34, 50]
    assert samples[-1]["cache"] == 2 * 2 * 50 * 16 * 4
    more = scripts.stream.read(model, cache, tokens(7), 1, 3)
    assert [sample["tokens"] for sample in more] == [53, 56]
    assert cache.get_seq_length() == 57
    assert all(sample["resident"] > 0 for sample in samples + more)


def test_growth_counts_from_a_tenth_on(scripts: Any) -> None:
    """What comes before is warm-up; one sample that is off does not count, but any growth of the cache does."""
    flat = [{"tokens": number, "resident": 100 * MIB, "cache": 1000} for number in range(1, 101)]
    flat[3]["resident"], flat[50]["resident"], flat[99]["resident"] = 0, 900 * MIB, 900 * MIB
    assert scripts.stream.growth(flat) == {"resident": 0, "cache": 0}
    leak = [{**sample, "resident": sample["resident"] + sample["tokens"] * MIB} for sample in flat]
    assert scripts.stream.growth(leak)["resident"] / MIB == pytest.approx(80, abs=3)
    assert scripts.stream.growth([*flat[:-1], {**flat[-1], "cache": 1001}])["cache"] == 1
    assert scripts.stream.growth(flat[:1]) == {"resident": 0, "cache": 0}


@pytest.mark.parametrize(
    ("found", "number"),
    [
        ({"resident": 4 * MIB, "cache": 0}, 0),
        ({"resident": 5 * MIB, "cache": 1}, 2),
        ({"resident": 0, "cache": 1}, 1),
    ],
)
def test_only_a_constant_state_can_fail(scripts: Any, found: dict[str, int], number: int) -> None:
    assert len(scripts.stream.failures("lara", found, 4.0)) == number
    assert len(scripts.stream.failures("eva-bounded", found, 4.0)) == number
    assert scripts.stream.failures("eva", found, 4.0) == scripts.stream.failures("softmax", found, 4.0) == []


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory as Linux tells it")
@pytest.mark.parametrize("kind", ["softmax", "favor_sharp", "eva-bounded"])
def test_the_script_about_streams(scripts: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.stream, "growth", lambda samples: {"resident": 0, "cache": 7})
    out = tmp_path / "out.json"
    result = run(scripts.stream, "--kind", kind, "--tokens", 64, "--piece", 16, "--generate", 8, "--out", out)
    assert result.exit_code == (0 if kind == "softmax" else 1), result.output
    content = json.loads(out.read_text(encoding="utf-8"))
    assert len(content["failures"]) == (0 if kind == "softmax" else 2)
    ends = {name: samples[-1]["tokens"] for name, samples in content["samples"].items()}
    assert ends == {"in pieces": 64, "one by one": 72}
    assert run(scripts.stream, "--kind", "favour").exit_code == 2


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


def test_one_row_per_kind(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity, out = scripts.generation_fidelity, tmp_path / "out.json"
    monkeypatch.setattr(fidelity.transformers.AutoTokenizer, "from_pretrained", lambda path: None)
    monkeypatch.setattr(scripts.shared, "read_tokens", lambda tokenizer, paths: tokens(400))
    monkeypatch.setattr(fidelity, "AGREEMENT", 0.8)
    files = ["--model", tmp_path, "--train", tmp_path, "--eval", tmp_path, "--out", out]
    sizes = ["--steps", 1, "--window", 40, "--windows", 2, "--single", 1, "--prompts", 1]
    result = run(fidelity, *files, *sizes, "--kinds", "favor_plus,lara")
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["kind"] for row in rows] == ["softmax", "favor_plus", "lara"]
    for row in rows:
        assert row["difference_in_pieces"] <= 1e-4
        assert row["difference_token_by_token"] <= 1e-4
        assert row["greedy_equal"] == [6]
        assert 0.8 < row["bfloat16_agreement"] <= 1
    assert "bounded" in run(fidelity, *files[:6], "--kinds", "favour").output


@torch.inference_mode()
def test_a_cache_that_forgets_is_seen(fidelity: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same script with logits that are off by a little, and with a cache without its first token."""
    model, rows = gpt2(), tokens(2, 40)
    good = {**fidelity.perplexities(model, rows, 1), "bfloat16_agreement": 1.0, "greedy_equal": [6]}
    assert fidelity.failures(good) == []
    bad = {"bfloat16_agreement": 0.98, "greedy_equal": [5], "difference_in_pieces": float("nan")}
    for name, value in bad.items():
        (only,) = fidelity.failures({**good, name: value})
        assert name.split("_")[0] in only
    read = fidelity.read

    def forgetful(model: Any, row: Tensor, sizes: list[int] | None = None) -> Tensor:
        return read(model, row if sizes is None else torch.cat([row[:1], row[:1], row[2:]]), sizes)

    monkeypatch.setattr(fidelity, "read", forgetful)
    assert len(fidelity.failures({**good, **fidelity.perplexities(model, rows, 1)})) == 2
    assert fidelity.agreement(gpt2().to(torch.bfloat16), rows)["bfloat16_agreement"] < 0.99


def test_greedy_counts_up_to_the_first_other_token(fidelity: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generate, prompts = gpt2(), GPT2LMHeadModel.generate, tokens(1, 12)

    def off(self: Any, prompt: Tensor, *, use_cache: bool, **rest: Any) -> Tensor:
        out = generate(self, prompt, use_cache=use_cache, **rest)
        if use_cache:
            out[0, 12 + 2] += 1
        return out

    found = fidelity.greedy(model, prompts)
    assert found["greedy_equal"] == [6]
    assert 1 <= found["greedy_distinct"][0] <= 6
    monkeypatch.setattr(GPT2LMHeadModel, "generate", off)
    assert fidelity.greedy(model, prompts)["greedy_equal"] == [2]
