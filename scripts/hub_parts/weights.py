"""Whether a model has the weights of a file, whatever the two call them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

ADDED = ".linattn."  # tensors of converted layers, which no stock checkpoint has


def digest(tensor: Tensor) -> str:
    """Of shape, type and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def digest_of_all(model: nn.Module) -> str:
    """Of all parameters and buffers that are saved, with their names."""
    parts = sorted(f"{name} {digest(tensor)}" for name, tensor in model.state_dict().items())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_weights(model: nn.Module, file: Mapping[str, Tensor], is_unused: Callable[[str], bool]) -> int:
    """Raise unless every weight of the model is a tensor of the file, and every used one of the file is in the model.

    By value, not by name: old checkpoints have old names, and one that is not renamed leaves a fresh weight behind. A
    fresh weight is equal to no tensor of the file, or leaves one of the file without a place.

    Args:
        is_unused: Whether the model has no place for a tensor of the file.
    Returns: How many tensors of the file have been found.
    """
    used = {name: digest(tensor) for name, tensor in file.items() if not is_unused(name)}
    own = {name: digest(tensor) for name, tensor in model.state_dict().items() if ADDED not in name}
    in_file, in_model = set(used.values()), set(own.values())
    fresh = [name for name, value in own.items() if value not in in_file]
    lost = [name for name, value in used.items() if value not in in_model]
    if fresh or lost:
        raise AssertionError(
            f"weights are not those of the file: {_some(fresh)} of the model equal nothing in it, {_some(lost)} of"
            " the file are not in the model"
        )
    return len(used)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    if not listed:
        return "none"
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
