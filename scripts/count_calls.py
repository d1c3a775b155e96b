"""How much Python one attention call is: calls of functions defined in the package, and the files they are in.

    python scripts/count_calls.py                        # every kind
    python scripts/count_calls.py favor_plus --top 20    # the functions called most
    python scripts/count_calls.py favor_plus --path      # file by file, in the order of the calls

The call is the second one of the attention module of a converted BERT: eval mode, default settings, no mask and 48
tokens. Generator expressions and lambdas count as calls. "To the product" is the way of a query from the function that
Transformers calls to the first product of matrices. A move is a call into another file than the call before.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from transformers import BertConfig, BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_linattn
from hf_linattn.kernels.native.calls import in_parts

ROOT = Path(hf_linattn.__file__).parent
TOKENS, HIDDEN = 48, 64
# What multiplies matrices: functions and methods of torch, and parts of the names of operators in `torch.ops`.
PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "baddbmm_", "einsum", "linear", "scaled_dot_product_attention"}
OPERATORS = ("scaled_dot_product", "linear_pointwise", *(f".{name}." for name in PRODUCTS))


@dataclass(frozen=True)
class Call:
    """One Python call of a function of the package."""

    file: str
    function: str


@dataclass
class Way:
    """Calls in their order."""

    calls: list[Call] = field(default_factory=list)

    @property
    def files(self) -> int:
        return len({call.file for call in self.calls})

    @property
    def moves(self) -> int:
        return len(self.stations())

    def stations(self) -> list[tuple[str, list[str]]]:
        """Each file that is entered, with the functions called before the next one is."""
        found: list[tuple[str, list[str]]] = []
        for call in self.calls:
            if not found or found[-1][0] != call.file:
                found.append((call.file, []))
            found[-1][1].append(call.function)
        return found


@dataclass(frozen=True)
class Count:
    """The whole call, and its part from the attention function to the first product."""

    whole: Way
    to_product: Way


def count_calls(kind: str) -> Count:
    """Count one attention call of a kind."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, intermediate_size=HIDDEN, vocab_size=50
    )
    model = hf_linattn.convert(BertModel(config), kind).eval()
    attention = model.encoder.layer[0].attention.self
    hidden = torch.randn(1, TOKENS, HIDDEN)
    profiler = _Profiler(entry=ALL_ATTENTION_FUNCTIONS[kind].__code__)
    with torch.no_grad():
        attention(hidden)
        with profiler.running():
            attention(hidden)
    return Count(profiler.whole, profiler.to_product)


class _Profiler:
    """Notes the calls of functions of the package, and which of them are between `entry` and the first product."""

    def __init__(self, entry: CodeType) -> None:
        self.whole, self.to_product = Way(), Way()
        self._entry = entry
        self._is_on_way = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        operator = torch.Tensor.__matmul__

        def matmul(left: Any, right: Any) -> Any:  # a profiler is not told of `@`
            self._is_on_way = False
            return operator(left, right)

        torch.Tensor.__matmul__ = matmul  # type: ignore[method-assign]
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)
            torch.Tensor.__matmul__ = operator  # type: ignore[method-assign]

    def _note(self, frame: FrameType, event: str, called: Any) -> None:
        code = frame.f_code
        if event == "c_call" and called.__name__ in PRODUCTS:
            self._is_on_way = False
        elif event == "call" and code.co_filename.endswith("torch/_ops.py"):
            name = str(frame.f_locals.get("self"))
            self._is_on_way &= not any(part in name for part in OPERATORS)
        elif event == "call" and code.co_filename.startswith(str(ROOT)):
            call = Call(str(Path(code.co_filename).relative_to(ROOT)), code.co_name)
            self.whole.calls.append(call)
            self._is_on_way |= code is self._entry
            if self._is_on_way:
                self.to_product.calls.append(call)
            self._is_on_way &= code is not in_parts.__code__  # which calls C


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="default: all")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="the N functions that are called most")
    parser.add_argument("--path", action="store_true", help="the files in order, with the functions called in them")
    options = parser.parse_args(arguments)
    logging.getLogger("hf_linattn").setLevel(logging.ERROR)
    print(f"{'kind':14} {'calls':>5} {'files':>5} {'moves':>5}   to the product: calls files moves")
    for kind in options.kinds or hf_linattn.list_kinds():
        count = count_calls(kind)
        whole, part = count.whole, count.to_product
        print(
            f"{kind:14} {len(whole.calls):5} {whole.files:5} {whole.moves:5}"
            f" {len(part.calls):23} {part.files:5} {part.moves:5}"
        )
        for call, number in Counter(whole.calls).most_common(options.top):
            print(f"    {number:4} {call.file} {call.function}")
        if options.path:
            print("  to the first product:")
            for file, functions in part.stations():
                print(f"    {file}: {', '.join(functions)}")


if __name__ == "__main__":
    main()
