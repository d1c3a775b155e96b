# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<3",
#     "transformers>=5.10,<6",
#     "safetensors>=0.5",
#     "huggingface_hub>=1.5,<3",
#     "jinja2>=3.1",
#     "pyyaml>=6",
#     "accelerate>=1.10",
#     "datasets>=4.0",
#     "evaluate>=0.4.5",
#     "peft>=0.17",
#     "pyarrow>=18",
#     "rich>=13",
#     "scikit-learn>=1.5",
#     "scipy>=1.13",
#     "seqeval>=1.2.2",
# ]
# ///
"""Run a recipe without a cluster and without installing anything: on this machine with uv, or as a Hugging Face Job.

    uv run recipes/uv_job.py text_classification --model_name_or_path google-bert/bert-base-uncased ...

    hf jobs uv run --flavor a100x4 --secrets HF_TOKEN -v .:/checkout -v hf://buckets/me/runs:/runs \\
        recipes/uv_job.py --checkout /checkout text_classification \\
        --model_name_or_path google-bert/bert-base-uncased --dataset_name me/data --do_train \\
        --output_dir /runs/favor_sharp ...

A job finds the checkout where it is mounted, and keeps what it writes in a bucket or on the Hub (`--push_to_hub`). It
uses all GPUs: one with `single_gpu.yaml`, several with `ddp.yaml` of `recipes/configs/accelerate`, or as
`--accelerate` says. The flags after the recipe's name are the recipe's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's own flags, and the recipe's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkout", type=Path, help="Folder of the repository (default: where this script lies)")
    parser.add_argument("--accelerate", help="A name in recipes/configs/accelerate, or a file")
    parser.add_argument("--processes", type=int, help="How many (default: one for each GPU, or one)")
    parser.add_argument("recipe", help="A script of recipes/, for example text_classification")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="Of the recipe")
    args = parser.parse_args(argv)
    return args, args.flags


def command(args: argparse.Namespace, flags: Sequence[str], gpus: int) -> tuple[list[str], Path]:
    """The launch line, and the folder it runs in.

    Args:
        gpus: How many this machine has.
    Raises: SystemExit with what is wrong.
    """
    checkout = (args.checkout or Path(__file__).resolve().parents[1]).resolve()
    script = checkout / "recipes" / f"{args.recipe}.py"
    if not script.is_file():
        sys.exit(f"error: there is no {script}. Name a script of recipes/, and the repository's folder (--checkout).")
    processes = args.processes or max(gpus, 1)
    name = args.accelerate or ("single_gpu" if processes == 1 else "ddp" if gpus else "cpu")
    config = Path(name) if name.endswith(".yaml") else checkout / "recipes/configs/accelerate" / f"{name}.yaml"
    if not config.is_file():
        sys.exit(f"error: --accelerate must be a name in recipes/configs/accelerate or a file; got {name!r}.")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, "--num_processes", str(processes), str(script), *flags], checkout


def main(
    argv: Sequence[str] | None = None,
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
    gpus: int | None = None,
) -> int:
    """Launch the recipe. Returns its exit status.

    Args:
        argv: Command line; that of the program by default.
        run: What runs the launch line, as `subprocess.run`.
        gpus: How many there are; counted by default.
    """
    args, flags = parse(argv)
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    line, checkout = command(args, flags, gpus)
    paths = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths}
    if not gpus:
        env["ACCELERATE_USE_CPU"] = "true"
    print(" ".join(line), flush=True)
    return run(line, cwd=os.getcwd(), env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
