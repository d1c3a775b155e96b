"""One attention call stays few Python calls in few files."""

from __future__ import annotations

import pytest

from count_calls import count_calls, main
from hf_linattn.kernels.short_slots.native_kernel import is_compiled

# Calls of functions of the package in one attention call. Without a C compiler some find that out.
MORE_CALLS = 0 if is_compiled() else 8
MOST_CALLS = {"eva": 60, "favor_plus": 60, "favor_sharp": 90, "lara": 80}
# On the way of a query from the function that Transformers calls to the first product of matrices, which for short
# inputs is in the one operator at its end.
MOST_FILES, MOST_MOVES = 20 if is_compiled() else 22, 40


@pytest.mark.parametrize("kind", MOST_CALLS)
def test_calls_of_one_attention_call(kind: str) -> None:
    assert len(count_calls(kind).whole.calls) <= MOST_CALLS[kind] + MORE_CALLS


@pytest.mark.parametrize("kind", MOST_CALLS)
def test_way_to_the_first_product(kind: str) -> None:
    way = count_calls(kind).to_product
    assert way.files <= MOST_FILES
    assert way.moves <= MOST_MOVES


@pytest.mark.parametrize("kind", MOST_CALLS)
def test_the_way_is_a_part_of_the_call(kind: str) -> None:
    count = count_calls(kind)
    way, calls = count.to_product.calls, count.whole.calls
    assert way[0].file == "integrations/interface.py"
    start = calls.index(way[0])
    assert calls[start : start + len(way)] == way
    assert len(way) < len(calls) - start


def test_listing_of_functions_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    main(["eva", "--top", "3", "--path"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "eva"
    assert int(lines[2].split()[0]) >= int(lines[4].split()[0])
    assert any(line.strip().startswith("integrations/interface.py:") for line in lines)
