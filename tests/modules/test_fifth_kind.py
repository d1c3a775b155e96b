"""A kind that is added in one file with one call (`tests/fifth_kind.py`) has everything that the others have.

In processes of their own: a kind that is registered stays.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forked_programs import run_forked

TESTS = Path(__file__).resolve().parents[1]
NAME = "own_directions"

FILES = [
    "modules/test_modules.py",  # dtypes, devices, copies, dropout
    "integrations/test_padding.py",
    "conversion/test_compare.py",
    "models/test_checkpoints.py",
    "hub/test_model_card.py",
    "generation/test_greedy.py",
]
FOLDERS = ["modules", "integrations", "conversion", "models", "hub", "generation", "common", "deployment", "around"]


def run(*arguments: str) -> str:
    """The output of Python with this kind's file at hand."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return run_forked(list(arguments), {**os.environ, "PYTHONPATH": path}, timeout=590).stdout


def run_tests(*options: str, files: list[str]) -> str:
    paths = [str(TESTS / file) for file in files]
    return run("-m", "pytest", "-q", "-p", "fifth_kind", "-p", "no:cacheprovider", "-k", NAME, *options, *paths)


def test_the_matrix() -> None:
    assert " passed" in run_tests("-m", "not slow and not gpu", files=FILES)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_that_runs_over_kinds() -> None:
    assert " passed" in run_tests("-m", "not slow and not gpu", files=FOLDERS)


LEARNED = """
import pytest, torch, hf_linattn, fifth_kind
from cases import BERT, GPT2
from hf_linattn.errors import UnsupportedError

settings = fifth_kind.FifthConfig(num_directions=16, window_size=8, learned=True)
for case in (BERT, GPT2):
    model = case.build()
    model.config.linear_attention = settings.to_dict()
    model.set_attn_implementation(fifth_kind.NAME)
    with pytest.raises(UnsupportedError, match="learns directions, and native mode has no parameters.*or convert"):
        model(**case.inputs())
    converted = hf_linattn.convert(case.build(), settings).train()
    converted(**case.inputs())[0].square().mean().backward()
    learned = [p for name, p in converted.named_parameters() if name.endswith("linattn.directions")]
    assert len(learned) == 2 and all(p.grad.abs().max() > 0 for p in learned)
"""


COMMAND = """
import sys, fifth_kind
from hf_linattn.cli import main

sys.argv = ["hf-linattn", "bench", "attention", "--kinds", fifth_kind.NAME, "--lengths", "64", "--peers", "",
            "--seconds", "0.001", "--heads", "2", "--head-dim", "8"]
main()
"""


def test_learned_tensors_are_trained_and_refused_in_native_mode_and_the_command_measures_it() -> None:
    """One after the other in one process, which imports everything once."""
    assert run("-c", LEARNED + COMMAND).count(NAME) >= 4  # forward and with gradients, causal and not
