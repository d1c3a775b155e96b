"""Accelerate's own FSDP2 on CPU processes.

On a CPU Accelerate leaves FSDP out without a word. What follows from that decision (sharding, switching the
optimizer's parameters, gathering and saving) runs on gloo as well, so here the decision alone is taken back.
"""

from __future__ import annotations

import os
import shlex
from typing import Any

import launch_lines
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from hub_server import ROOT

CONFIGS = ROOT / "recipes" / "configs" / "accelerate"


def as_launched(config: str) -> None:
    """The environment of a process of `accelerate launch --config_file`; in this process for good."""
    line = [
        "accelerate",
        "launch",
        "--config_file",
        str(CONFIGS / config),
        "--num_processes",
        str(dist.get_world_size()),
    ]
    os.environ.update(launch_lines.environment_of(launch_lines.read(shlex.join([*line, "x.py"]))))
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # the group is there
    if config == "fsdp2.yaml":
        _shard_on_cpus()


def _shard_on_cpus() -> None:
    make = Accelerator.__init__

    def making(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        state = self.state._shared_state
        if state["distributed_type"] == DistributedType.FSDP:
            return
        plugin = FullyShardedDataParallelPlugin()
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    Accelerator.__init__ = making  # type: ignore[method-assign]
