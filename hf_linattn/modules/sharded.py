"""Parameters that FSDP2 has sharded, where a whole value goes into them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def like_sharded(value: Tensor, held: Any) -> Tensor:
    """A value that all processes have, as the part of it that belongs where `held` is. Exchanges nothing."""
    if not hasattr(held, "full_tensor"):  # no DTensor
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = held.device_mesh
    everywhere = DTensor.from_local(value.to(held.dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)
    found: Tensor = everywhere.redistribute(placements=held.placements)
    return found
