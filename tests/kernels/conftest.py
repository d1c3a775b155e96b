"""What a GPU does and Triton's interpreter does not, and a user who has compiled nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest
import torch

from hf_linattn.kernels.native import build


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a user who has compiled nothing yet."""
    build.library.cache_clear()
    monkeypatch.setenv("HF_LINATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_LINATTN_COMPILE", raising=False)
    yield tmp_path / "cache"
    build.library.cache_clear()


def round_to_nearest() -> None:
    """Triton 3.9's interpreter cuts float32 off to bfloat16. A GPU rounds to the nearest, and tests measure errors."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.cast_impl

    def cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return convert(self, source, target)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(rounded, tl.bfloat16)

    InterpreterBuilder.cast_impl = cast


def patch_once() -> None:
    """Triton replaces `triton.language` anew for every function that a kernel calls: here once per launch.

    Nor are sums of int32 computed in int64 as well, to see whether they overflow: a GPU does not look, and indices of
    inputs that the interpreter can take are small. Both together are half of the time of these tests.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton
        return
    patch = interpreter._patch_lang
    scopes: dict[frozenset[str], interpreter._LangPatchScope] = {}  # of the launch under way, the launch itself first

    class Scope:
        def restore(self) -> None:
            for scope in reversed(scopes.values()):
                scope.restore()
            scopes.clear()

    def patched(function: FunctionType) -> Scope:
        modules = (interpreter.tl, interpreter.tl.core)
        named = frozenset(z.__name__ for z in modules if any(z is known for known in function.__globals__.values()))
        if named not in scopes:
            scopes[named] = patch(function)
        return Scope()

    interpreter._patch_lang = patched
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    round_to_nearest()
    patch_once()
