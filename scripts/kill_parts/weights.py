"""Whether two runs ended with the same weights."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file


def difference(ours: Path, theirs: Path) -> str:
    """Empty if two files hold the same tensors, bit by bit."""
    one, two = load_file(ours), load_file(theirs)
    if one.keys() != two.keys():
        return f"other tensors: {sorted(one.keys() ^ two.keys())}"
    off = [name for name in one if one[name].numpy().tobytes() != two[name].numpy().tobytes()]
    largest = max((float((one[name].double() - two[name].double()).abs().max()) for name in off), default=0.0)
    return f"{len(off)} tensors differ, by at most {largest:.1e}" if off else ""
