"""Copies of a memory's tensors between devices, on CUDA streams of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def copying_stream(device: torch.device | str, tensor: Tensor | None) -> torch.cuda.Stream | None:
    """The stream that copies between a tensor's device and another one; `None` if no GPU takes part."""
    devices = (torch.device(device), *([] if tensor is None else [tensor.device]))
    gpu = next((found for found in devices if found.type == "cuda"), None)
    return None if gpu is None else torch.cuda.current_stream(gpu)


def wait_for_copy(stream: torch.cuda.Stream, tensor: Tensor | None) -> torch.cuda.Stream | None:
    """Make those that use a tensor next wait for its copy on `stream`: the current stream, or the host.

    Returns: The stream that the next copy has to wait for; `None` if it need not wait.
    """
    if tensor is None or tensor.device.type == "cpu":
        stream.synchronize()
        return None
    current = torch.cuda.current_stream(tensor.device)
    current.wait_stream(stream)
    return current
