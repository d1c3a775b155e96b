"""Every mistake on the command line is one line that says what to do, status 2, and nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from shell import mistake, shell

CONVERT, CALIBRATE, TRANSFER = ("convert", "{gpt2}", "{out}"), ("calibrate", "{sharp}", "{out}"), ("transfer",)
TEXTS = ("--inputs", "{text}")
COMPARE = ("compare", "{favor}")

MISTAKES = [
    # -- what to convert to
    ((*CONVERT, "--kind", "favour_plus"), "Unknown attention kind 'favour_plus'; registered kinds: ['eva', "),
    ((*CONVERT, "--kind", "favour_plus"), "Did you mean 'favor_plus'?"),
    (CONVERT, "Nothing to do: give --kind"),
    ((*CONVERT, "--kind", "eva", "--set", "windowsize=8"), "has no field 'windowsize'; fields: ['window_size', "),
    ((*CONVERT, "--kind", "eva", "--set", "windowsize=8"), "Did you mean 'window_size'?"),
    ((*CONVERT, "--kind", "eva", "--set", "window_size=many"), "window_size must be an integer >= 1"),
    ((*CONVERT, "--kind", "eva", "--set", "window_size"), "--set must look like 'window_size=64'; got 'window_size'"),
    ((*CONVERT, "--kind", "eva", "--set", "seed=1", "--set", "seed=2"), "--set names 'seed' twice; got 1 and '2'"),
    ((*CONVERT, "--kind", "eva", "--learned", "--set", "learned=false"), "--learned contradicts --set learned=False"),
    ((*CONVERT, "--set", "seed=1"), "--learned, --set and --layers belong to a kind"),
    ((*CONVERT, "--kind", "eva", "--layers", "1-x"), "--layers must look like '0,1,4-5'; got '1-x'"),
    ((*CONVERT, "--kind", "eva", "--layers", "0-9"), "layers must be integers from 0 to 1"),
    ((*CONVERT, "--kind", "eva", "--extend-positions", "10"), "num_positions must be at least the 64"),
    ((*CONVERT, "--extend-positions", "96", "--extend-method", "tiled"), "['tile', 'interpolate']; got 'tiled'"),
    ((*CONVERT, "--revert"), "revert() needs a converted model; got GPT2LMHeadModel"),
    ((*CONVERT, "--kind", "eva", "--dtype", "fp16"), "--dtype must be one of ['auto', 'float32', "),
    ((*CONVERT, "--kind"), "Option '--kind' requires an argument"),
    ((*CONVERT, "--kinds", "eva"), "No such option"),
    (("convert", "{gpt2}"), "Missing argument 'OUT'"),
    (("konvert",), "No such command 'konvert'"),
    # -- models and folders
    (("convert", "{nowhere}", "{out}", "--kind", "eva"), "There is no folder"),
    (("convert", "no/such-model", "{out}", "--kind", "eva"), "The model 'no/such-model' cannot be loaded"),
    (("convert", "{images}", "{out}", "--kind", "eva"), "cannot be loaded"),
    (("convert", "{gpt2}", "{full}", "--kind", "eva"), "is not empty. Name another one, or give --overwrite"),
    (("convert", "{gpt2}", "{text}", "--kind", "eva"), "The output must be a folder"),
    (("convert", "{gpt2}", "{text}/out", "--kind", "eva"), "Nothing can be written to"),
    (("info", "{nowhere}"), "There is no folder"),
    # -- calibrate
    (("calibrate", "{gpt2}", "{out}", *TEXTS), "calibrate() needs a converted model; got GPT2LMHeadModel"),
    (("calibrate", "{plain}", "{out}", *TEXTS), "No layer of this model has statistics to calibrate"),
    ((*CALIBRATE, *TEXTS, "--attention", "lineal"), "--attention must be one of ['softmax', 'linear']; got 'lineal'"),
    (CALIBRATE, "Missing option '--inputs'"),
    # -- transfer
    ((*TRANSFER, "{gpt2}", "{out}", *TEXTS), "Attention transfer needs a converted model; got GPT2LMHeadModel"),
    ((*TRANSFER, "{plain}", "{out}", *TEXTS), "No layer of this model has anything to train by itself"),
    ((*TRANSFER, "{sharp}", "{out}", *TEXTS), "Set them first: hf-linattn calibrate"),
    ((*TRANSFER, "{favor}", "{out}", *TEXTS, "--steps", "0"), "--steps and --second-stage are both 0"),
    ((*TRANSFER, "{favor}", "{out}", *TEXTS, "--held-out", "0", "--ablations"), "give --held-out, at least 1"),
    ((*TRANSFER, "{favor}", "{out}", *TEXTS, "--held-out", "900"), "beside the 900 that are held out"),
    ((*TRANSFER, "{favor}", "{out}", *TEXTS, "--learning-rate", "-1"), "learning_rate must be a finite number >= 0"),
    ((*TRANSFER, "{favor}", "{out}", *TEXTS, "--layers", "5"), "layers must be integers from 0 to 1; got 5"),
    ((*TRANSFER, "{favor}", "{out}", *TEXTS, "--max-length", "8", "--held-out", "1"), "fit into the window"),
    # -- compare
    (("compare", "{gpt2}", *TEXTS), "compare needs a model with linear attention"),
    ((*COMPARE, *TEXTS, "--kind", "eva"), "--kind is for stock models; this one is converted to 'favor_plus'"),
    ((*COMPARE, *TEXTS, "--set", "seed=1"), "--set belongs to a kind"),
    ((*COMPARE, *TEXTS, "--plot", "{out}.xyz"), "--plot must end in one of"),
    ((*COMPARE, *TEXTS, "--plot", "{out}/heads.png"), "cannot be written"),
    ((*COMPARE, *TEXTS, "--device", "qpu"), "--device must be one of ['cpu'"),
    ((*COMPARE, *TEXTS, "--rows", "0"), "--rows"),
    # -- inputs
    ((*COMPARE, "--inputs", "{nowhere}/*.txt"), "*.txt' does not exist"),
    ((*COMPARE, "--inputs", "{gpt2}/config.yaml"), "does not exist"),
    ((*COMPARE, *TEXTS, "--inputs", "{jsonl}"), "must be files of one format; got ['.jsonl', '.txt']"),
    ((*COMPARE, "--inputs", "{images}"), "--inputs must be files (.parquet, .csv"),
    ((*COMPARE, "--inputs", "{gpt2}/model.safetensors"), "--inputs must be one of ['.csv', '.json', "),
    ((*COMPARE, *TEXTS, "--max-length", "65"), "--max-length must be at most 64"),
    ((*COMPARE, "--inputs", "{jsonl}", "--column", "texts"), "--column 'texts' is not a column of the data"),
    ((*COMPARE, "--inputs", "{jsonl}", "--column", "label"), "Column 'label' has values that are not text"),
    (("compare", "{vit}", "--kind", "eva", "--inputs", "{jsonl}"), "--inputs must be one of ['.parquet']"),
    (("compare", "{vit}", "--kind", "eva", "--inputs", "{images}", "--no-pack"), "--no-pack is for texts"),
    (("compare", "{vit}", "--kind", "eva", "--inputs", "{pixels}", "--column", "label"), "cannot be read"),
    # -- push
    (("push", "{nowhere}", "me/model"), "FOLDER must be a folder with a converted checkpoint"),
    (("push", "{gpt2}", "me/model"), "is a stock model ('gpt2'). Upload it with: hf upload me/model"),
    (("push", "{favor}", "me/a/b"), "REPO_ID 'me/a/b' cannot be the name of a repository"),
]


@pytest.mark.parametrize(("command", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_one_line_and_nothing_written(folder: Path, tmp_path: Path, command: tuple[str, ...], words: str) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    names = ("gpt2", "vit", "favor", "sharp", "plain", "images")
    places = {name: folder / name for name in names}
    places |= {"text": folder / "text.txt", "jsonl": folder / "text.jsonl", "pixels": folder / "images.parquet"}
    places |= {"out": tmp_path / "out", "full": full, "nowhere": tmp_path / "nowhere"}
    line = mistake(*(part.format(**places) for part in command))
    assert words in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "notes.txt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "The inputs have no rows"),
        ("short.txt", b"w1 w2\n", "gives no rows of 64 tokens"),
        ("empty.jsonl", b"", "has no rows"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "JSON parse error"),
        ("missing.jsonl", b'{"text": "a"}\n{"text": null}\n', "has values that are not text, or are missing"),
        ("broken.parquet", b"nonsense", "not a parquet file"),
        ("latin.txt", "café\n".encode("latin-1"), "codec can't decode"),
        ("other.csv", b"words,label\na,1\n", "No column is called 'text' or 'sentence'"),
    ],
)
def test_files_that_cannot_be_read(folder: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in mistake("compare", folder / "favor", "--inputs", tmp_path / name)


def test_images_that_are_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
    line = mistake("compare", folder / "vit", "--kind", "eva", "--inputs", tmp_path / "pictures")
    assert "cannot identify image file" in line


def test_without_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("cli.inputs", "data", "data.files", "data.rows"):
        monkeypatch.delitem(sys.modules, f"hf_linattn.{name}", raising=False)
    line = mistake("compare", folder / "favor", "--inputs", folder / "text.txt")
    assert "Reading inputs needs datasets, which is not installed: pip install 'hf-linattn[cli]'" in line


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command shows what it is for and one example; without a command there is the list of them."""
    commands = ("convert", "calibrate", "transfer", "compare", "eval", "push", "info")
    listed = shell().stdout
    for name in commands:
        assert name in listed
        assert f"Example: hf-linattn {name} " in shell(name, "--help").stdout


def test_what_fails_has_another_status(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full, and a Hub that is not there: another command line would not help."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_linattn.cli.checkpoints.write_card", full)
    result = shell("convert", folder / "gpt2", tmp_path / "out", "--kind", "eva", exit_code=1)
    assert result.stderr.endswith("error: [Errno 28] No space left on device\n")
    result = shell("push", folder / "favor", "me/model", exit_code=1)
    assert "error: Nothing was uploaded to 'me/model': " in result.stderr
