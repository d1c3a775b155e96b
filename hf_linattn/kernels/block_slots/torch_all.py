"""All portable kernels under one name, so that one implementation can stand in for the other."""

from ..attend.torch_kernel import attend_backward, attend_forward
from .torch_kernel import scan_backward, scan_forward

__all__ = ["attend_backward", "attend_forward", "scan_backward", "scan_forward"]
