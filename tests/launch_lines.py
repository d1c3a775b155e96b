"""Launch lines of Accelerate: found in documents, and read as Accelerate reads them."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

FENCE = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    """The commands of a document, continued lines joined, without comments."""
    text = "\n".join(FENCE.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def read(line: str) -> argparse.Namespace:
    """What `accelerate launch` makes of a line; environment variables may stand before it."""
    words = shlex.split(line)
    start = words.index("accelerate")
    assert words[start + 1] == "launch", line
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words[start + 2 :]))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config) if defaults else ""
    return args


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """What the processes of a launch line find in their environment, beyond what torchrun tells them."""
    if args.use_deepspeed:
        return prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu or args.use_fsdp:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]
