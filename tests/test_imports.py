"""What `import hf_linattn` costs and what it leaves unimported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MEASURE = """
import sys, time
from transformers import AutoModel, BertModel, GPT2LMHeadModel, ViTModel
PRESENT = set(sys.modules)
start = time.process_time()  # of this process alone: other work on the machine does not count
import hf_linattn
print(time.process_time() - start)
heavy = ("triton", "matplotlib", "typer", "rich", "datasets", "accelerate", "evaluate", "torchvision", "jinja2")
print(",".join(name for name in heavy if name in sys.modules and name not in PRESENT))
"""


def run(code: str) -> list[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert out.stderr == "", out.stderr
    return out.stdout.splitlines()


def test_import_is_cheap() -> None:
    """Under 0.3 s on top of the stock model classes (best of up to three), and no package that they do not import."""
    seconds: list[float] = []
    while len(seconds) < 3 and min(seconds, default=1) >= 0.3:
        took, imported = (run(MEASURE) + [""])[:2]
        seconds.append(float(took))
        assert not imported, f"import hf_linattn also imports {imported}"
    assert min(seconds) < 0.3, seconds


def test_scripts_have_names_of_their_own() -> None:
    """One process of the tests imports scripts of several folders, each by its file's name."""
    found = [path.stem for folder in ("experiments", "recipes", "scripts") for path in (ROOT / folder).glob("*.py")]
    assert sorted(found) == sorted(set(found))


def test_public_names() -> None:
    import hf_linattn

    assert hf_linattn.__version__ == "0.1.0"
    for name in hf_linattn.__all__:
        assert getattr(hf_linattn, name) is not None, name
        assert name in dir(hf_linattn)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_linattn.no_such_name
