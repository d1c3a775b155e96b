"""The papers' experiments: every file is what its recipe takes, and small ones run on data of the same format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_checkpoints import build, encoded
from transformers import CONFIG_MAPPING, AutoTokenizer

import build_pixels
import build_proteins
import build_stand_ins
import image_classification
import language_modeling
import long_range_arena
import text_classification
from hf_linattn.modules.registry import get_kind
from lra.data import ArenaDataArguments
from lra.tasks import TASKS
from parts.common import SOFTMAX, RecipeError
from parts.finetuning import Flags, read_flags
from parts.models import override
from parts.training import ModelArguments, NewModelArguments

PAPERS = Path("recipes/configs/papers")
FILES = sorted(PAPERS.glob("*/*.yaml"))
ARENA = sorted(PAPERS.glob("*/lra.yaml"))
EXPERIMENTS = [path for path in FILES if path not in ARENA]
RECIPES: dict[str, tuple[ModuleType, type, type]] = {
    "glue": (text_classification, text_classification.ARGUMENTS, ModelArguments),
    "imagenet": (image_classification, image_classification.ARGUMENTS, NewModelArguments),
    "imagenet64": (language_modeling, language_modeling.ARGUMENTS, NewModelArguments),
    "lm1b_pretrained": (language_modeling, language_modeling.ARGUMENTS, NewModelArguments),
    "pg19": (language_modeling, language_modeling.ARGUMENTS, NewModelArguments),
    "proteins_causal": (language_modeling, language_modeling.ARGUMENTS, NewModelArguments),
    "proteins_concatenated": (language_modeling, language_modeling.ARGUMENTS, NewModelArguments),
    "proteins_masked": (language_modeling, language_modeling.ARGUMENTS, NewModelArguments),
    "wikitext103": (language_modeling, language_modeling.ARGUMENTS, NewModelArguments),
}
# What the first lines of a file ask for.
ASKED = {
    "glue_small": ["--model_name_or_path", "a folder"],
    "lm1b_pretrained_small": ["--model_name_or_path", "a folder"],
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def read(path: Path, *changes: str) -> Flags:
    _, data, model = RECIPES[path.stem.removesuffix("_small")]
    argv = ["--config", str(path), "--output_dir", "out", *ASKED.get(path.stem, []), *changes]
    return read_flags(data, argv, None, quiet=True, model_class=model)


# -- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_a_file_holds_flags_of_its_recipe(path: Path) -> None:
    flags = read(path)
    assert flags.training.do_train
    assert flags.training.do_eval
    assert flags.attention.attention == {"performer": "favor_plus"}.get(path.parent.name, path.parent.name)
    get_kind(flags.attention.attention).config_cls(**flags.attention.settings())  # raises for fields that do not exist
    if overrides := getattr(flags.model, "config_overrides", None):
        override(CONFIG_MAPPING[flags.model.model_type](), overrides)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_softmax_runs_under_the_same_settings(path: Path) -> None:
    flags, other = read(path), read(path, "--attention", SOFTMAX)
    assert other.attention.settings() == {}
    assert other.training.to_dict() == flags.training.to_dict()
    assert (other.data, other.model) == (flags.data, flags.model)


@pytest.mark.parametrize("path", ARENA, ids=name_of)
@pytest.mark.parametrize("task", [f"{task}{size}" for task in TASKS for size in ("", "_small")])
def test_long_range_arena(path: Path, task: str) -> None:
    files = ["--config", f"recipes/configs/lra/{task}.yaml", "--config", str(path), "--output_dir", "out"]
    flags = read_flags(ArenaDataArguments, files, None, quiet=True, model_class=long_range_arena.ArenaArguments)
    assert flags.model.task == task.removesuffix("_small")
    get_kind(flags.attention.attention).config_cls(**flags.attention.settings())


def test_every_experiment_has_a_small_variant() -> None:
    stems = {(path.parent.name, path.stem) for path in EXPERIMENTS}
    full = {(paper, stem) for paper, stem in stems if not stem.endswith("_small")}
    assert stems == full | {(paper, f"{stem}_small") for paper, stem in full}
    assert {path.parent.name for path in ARENA} == {"performer", "favor_sharp", "lara", "eva"}


def test_the_table_names_every_experiment() -> None:
    table = Path("docs/papers.md").read_text().partition("## Trained models")[2]
    named = set(re.findall(r"^\| `([\w/]+\.yaml)` \|", table, re.MULTILINE))
    files = [path for path in PAPERS.rglob("*.yaml") if not path.stem.endswith("_small")]
    assert named == {path.relative_to(PAPERS).as_posix() for path in files}


@pytest.mark.parametrize("path", sorted(PAPERS.rglob("*.yaml")), ids=name_of)
def test_a_file_says_whose_settings_they_are(path: Path) -> None:
    head = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"ours|Not here|No result", head, re.IGNORECASE)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_random_data_give_no_result(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[0].startswith("# No result") == any("build_stand_ins.py" in line for line in lines)
    assert lines[0].startswith("# No result") == (read(path).training.max_steps == 2)


# -- runs -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints, sentences, stand-ins of ImageNet and TrEMBL, and images as rows of pixels."""
    path = tmp_path_factory.mktemp("papers")
    build(path)
    rows = [{"sentence": f"w{i % 9} w{i % 7} w3", "label": i % 2} for i in range(24)]
    (path / "sst2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_stand_ins.main(["imagenet", "--rows", "10", "--output_dir", str(path / "imagenet")])
    build_stand_ins.main(["proteins", "--rows", "60", "--output_dir", str(path / "fasta")])
    shares = ["--validation_share", "0.2", "--test_share", "0.1"]
    fasta = str(path / "fasta" / "proteins.fasta")
    build_proteins.main(["--input", fasta, *shares, "--output_dir", str(path / "proteins")])
    pixels = ["--size", "4", "--output", str(path / "pixels.parquet"), "--tokenizer", str(path / "pixels")]
    build_pixels.main(["--input", str(path / "images.parquet"), *pixels])
    return path


BERT = "num_hidden_layers=1,hidden_size=16,num_attention_heads=2,intermediate_size=16,max_position_embeddings=64"
GPT2 = "n_layer=1,n_embd=16,n_head=2,n_inner=16,n_positions=64,attn_pdrop=0.0"
VIT = "num_hidden_layers=1,hidden_size=24,num_attention_heads=3,intermediate_size=24,image_size=56,patch_size=4"


def runs() -> list[Any]:
    """File -> flags that make the model tiny and name tiny data."""
    text = "train_file=text.jsonl validation_file=text.jsonl tokenizer_name=bert-mlm max_length=16"
    proteins = "train_file=proteins/train.parquet validation_file=proteins/validation.parquet"
    proteins += " tokenizer_name=proteins/tokenizer max_length=64"
    pixels = "train_file=pixels.parquet validation_file=pixels.parquet tokenizer_name=pixels max_length=49"
    sentences = "train_file=sst2.jsonl validation_file=sst2.jsonl model_name_or_path=bert-classifier max_length=16"
    images = "train_dir=imagenet/train validation_dir=imagenet/val"
    cases = {
        "favor_sharp/glue_small": (sentences, None),
        "eva/imagenet_small": (images, VIT),
        "lara/imagenet_small": (images, VIT),
        "eva/wikitext103_small": (text, GPT2),
        "performer/imagenet64_small": (pixels, GPT2),
        "performer/lm1b_pretrained_small": (f"{text} model_name_or_path=gpt2 tokenizer_name=gpt2", None),
        "performer/pg19_small": (text, BERT),
        "performer/proteins_masked_small": (proteins, BERT),
        "performer/proteins_causal_small": (proteins, GPT2),
    }
    return [pytest.param(*(name, *case), id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("name", "data", "overrides"), runs())
def test_small_variants_run(name: str, data: str, overrides: str | None, folder: Path, tmp_path: Path) -> None:
    path = PAPERS / f"{name}.yaml"
    argv = ["--config", str(path), "--output_dir", str(tmp_path), "--max_steps", "2", "--disable_tqdm", "true"]
    for flag, _, value in (part.partition("=") for part in data.split()):
        is_path = flag.endswith(("file", "dir", "path", "name"))
        argv += [f"--{flag}", str(folder / value) if is_path else value]
    argv += ["--per_device_train_batch_size", "2", "--max_eval_samples", "4", "--report_to", "none"]
    argv += ["--config_overrides", overrides] if overrides else []
    found = RECIPES[path.stem.removesuffix("_small")][0].main(argv, quiet=True)
    assert found["log"][-1]["step"] == 2
    assert found["attention"]["kind"] == read(path).attention.attention
    assert np.isfinite(found["metrics"]["eval"]["eval_loss"])


# -- builders ---------------------------------------------------------------------------------------------------------
def test_a_row_is_an_image(folder: Path, tmp_path: Path) -> None:
    """Every pixel of it, behind the start token, and nothing of the next one."""
    found = build_pixels.read_images(str(folder / "images.parquet"), None)
    levels = [np.asarray(image.convert("RGB").resize((4, 4), Image.Resampling.BOX)).reshape(-1) for image in found]
    argv = ["--train_file", str(folder / "pixels.parquet"), "--tokenizer_name", str(folder / "pixels"), "--do_train"]
    argv += ["--model_type", "gpt2", "--config_overrides", GPT2, "--max_length", "49", "--output_dir", str(tmp_path)]
    argv += ["--validation_split_percentage", "1"]  # the first image
    data, model = RECIPES["imagenet64"][1:]
    task = language_modeling.prepare(read_flags(data, argv, None, quiet=True, model_class=model))
    rows = np.array(task.data["train"]["input_ids"])
    assert (rows == [[256, *row] for row in levels[1:]]).all()
    assert (task.model.config.vocab_size, task.model.config.bos_token_id) == (259, 256)


def test_proteins_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(">sp|P1|X_Y Name\nMKV\nxa*\n;a comment as a name\nGG\n\n>last\nWWWWW")
    names, sequences = zip(*build_proteins.read_fasta(tmp_path / "a.fasta"), strict=True)
    assert names == ("sp|P1|X_Y", "a", "last")
    assert sequences == ("MKVXA", "GG", "WWWWW")
    build_proteins.main(["--input", str(tmp_path / "a.fasta"), "--clip", "4", "--output_dir", str(tmp_path / "out")])
    tables = [pq.read_table(path)["text"].to_pylist() for path in (tmp_path / "out").glob("*.parquet")]
    assert sorted(sum(tables, [])) == ["GG", "MKVX", "WWWW"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    ids = tokenizer("MKV\nGG\n")["input_ids"]
    assert tokenizer.decode(ids) == "MKV>GG>"
    assert (ids[3], ids.count(tokenizer.eos_token_id), tokenizer.mask_token) == (tokenizer.eos_token_id, 2, "*")


def test_equal_proteins_are_in_one_split(tmp_path: Path) -> None:
    sequences = [letter * length for letter in "ACDEFGHIKL" for length in range(1, 21)]
    (tmp_path / "a.fa").write_text("".join(f">{i}\n{s}\n" for i, s in enumerate(sequences * 2)))
    shares = ["--validation_share", "0.3", "--test_share", "0.3"]
    build_proteins.main(["--input", str(tmp_path / "a.fa"), *shares, "--output_dir", str(tmp_path)])
    splits = [pq.read_table(tmp_path / f"{s}.parquet")["text"].to_pylist() for s in ("train", "validation", "test")]
    assert sorted(sum(splits, [])) == sorted(sequences * 2)
    assert all(set(first).isdisjoint(second) for first, second in zip(splits, splits[1:] + splits[:1], strict=True))
    assert all(len(split) > 60 for split in splits)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("MKV\n", [], "is not FASTA: it must begin with a line '>name'; got 'MKV"),
        (
            ">a\nMK1\n",
            [],
            "'a' in",
        ),
        (">a\n>b\nMK\n", [], "a.fasta' is empty"),
        ("", [], "has no sequence"),
        (">a\nMK\n", ["--clip", "0"], "--clip must be at least 1; got 0"),
        (">a\nMK\n", ["--test_share", "1"], "together below 1; got 0.001 and 1.0"),
        (">a\nMK\n", ["--input", "b.txt"], "--input must be one of .fasta"),
        (">a\nMK\n", ["--input", "b.fasta.gz"], "cannot be read"),
    ],
)
def test_what_is_no_protein(content: str, changes: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(content)
    argv = ["--input", str(tmp_path / "a.fasta"), "--output_dir", str(tmp_path / "out"), *changes]
    with pytest.raises(RecipeError) as raised:
        build_proteins.main(argv)
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_images_of_several_sizes(tmp_path: Path) -> None:
    images = [encoded(Image.new("RGB", (size, 4))) for size in (4, 5)]
    pq.write_table(pa.table({"img": images}), tmp_path / "a.parquet")
    argv = ["--input", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "b.parquet")]
    with pytest.raises(
        RecipeError, match=r"must have one size: image 1 has 20 pixels, the first one 16\. Give --size"
    ):
        build_pixels.main(argv)
    build_pixels.main([*argv, "--size", "4"])
    assert pq.read_table(tmp_path / "b.parquet").num_rows == 2
