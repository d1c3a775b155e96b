"""The configs of Accelerate: that it accepts them, what they mean, and that every launch line of the docs works."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launch_lines
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from cases import BY_NAME
from hub_server import ROOT
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments

import hf_linattn
from hf_linattn import FavorPlusConfig
from hf_linattn.modules.base import LinearAttention
from hf_linattn.training import LinAttnCallback
from parts.common import RecipeError
from parts.processes import prepare_sharding

FOLDER = ROOT / "recipes" / "configs" / "accelerate"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md"]
LINES = [line for page in PAGES for line in launch_lines.shell_lines(page) if "accelerate launch" in line]
KINDS = {
    "single_gpu": "one",
    "ddp": "multi_gpu",
    "ddp_multi_node": "multi_gpu",
    "fsdp2": "use_fsdp",
    "zero2": "use_deepspeed",
    "zero3": "use_deepspeed",
    "cpu": "multi_gpu",
}


def launch(name: str, *flags: str) -> Any:
    return launch_lines.read(shlex.join(["accelerate", "launch", "--config_file", str(FOLDER / name), *flags, "x.py"]))


@pytest.fixture
def environment() -> Iterator[None]:
    """Put the environment back: a launch is one of variables."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


# -- what Accelerate makes of them ------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts_it(path: Path) -> None:
    """Its loader refuses keys that do not exist, the launcher does not: it would ignore those of a nested config."""
    config = load_config_from_file(str(path))
    known = vars(launch_lines.launch_command_parser().parse_args(["x.py"]))
    for nested in (config.fsdp_config, config.deepspeed_config):
        assert set(nested) <= set(known)
    args = launch(path.name)
    chosen = [name for name in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, name)] or ["one"]
    assert chosen == [KINDS[path.stem]]
    assert args.num_processes == config.num_processes
    assert args.mixed_precision == "no"


def test_every_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS} == set(KINDS)


def test_the_rendezvous_has_to_be_on_the_command_line() -> None:
    """As the comment in the file says."""
    content = yaml.safe_load((FOLDER / "ddp_multi_node.yaml").read_text())
    assert "rdzv_backend" not in content
    assert launch("ddp_multi_node.yaml").rdzv_backend == "static"
    assert launch("ddp_multi_node.yaml", "--rdzv_backend", "c10d").rdzv_backend == "c10d"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("name", "stage"), [("zero2", "2"), ("zero3", "3")])
def test_deepspeed(name: str, stage: str) -> None:
    found = launch_lines.environment_of(launch(f"{name}.yaml"))
    assert found["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert found.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "none") == ("true" if stage == "3" else "none")
    # Left to the recipe's flags.
    assert not {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"} & set(found)


# -- FSDP2 ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def sharding(environment: None) -> Iterator[Callable[..., Any]]:
    """Accelerate's sharding, as fsdp2.yaml asks for it, on a group of one CPU process.

    Through `Accelerator.prepare` a CPU process would get DDP.
    """
    os.environ.update(launch_lines.environment_of(launch("fsdp2.yaml")))
    os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def shard(model: Any, mixed_precision: str) -> Any:
        plugin = FullyShardedDataParallelPlugin()
        if mixed_precision != "no":
            plugin.set_mixed_precision(mixed_precision)
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision=mixed_precision,
            is_main_process=True,
            parallelism_config=None,
            device=torch.device("cpu"),
        )
        return fsdp2_prepare_model(accelerator, model)

    yield shard
    torch.distributed.destroy_process_group()


def converted(name: str, **settings: Any) -> Any:
    return hf_linattn.convert(BY_NAME[name].build(), FavorPlusConfig(window_size=4, num_features=8, **settings))


@pytest.mark.parametrize(
    ("name", "layers"), [("bert-classifier", "bert.encoder.layer"), ("gpt2", "transformer.h"), ("vit", "vit.layers")]
)
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_fsdp2(sharding: Callable[..., Any], name: str, layers: str, mixed_precision: str) -> None:
    """Layers and what linear attention learns are units; all tensors of the latter stay float32."""
    for settings in ({}, {"learned": True}):
        os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)
        model = converted(name, **settings)
        prepare_sharding(model)
        model = sharding(model, mixed_precision)
        LinAttnCallback().on_train_begin(TrainingArguments("x"), TrainerState(), TrainerControl(), model=model)
        units = {path for path, module in model.named_modules() if isinstance(module, FSDPModule)}
        assert {f"{layers}.0", f"{layers}.1", ""} <= units
        attention = next(module for module in model.modules() if isinstance(module, LinearAttention))
        met: dict[str, torch.Tensor] = {}
        attention.register_forward_pre_hook(lambda module, _, met=met: met.update(module.tensors()))
        pixels, ids = {"pixel_values": torch.rand(2, 3, 24, 24)}, {"input_ids": torch.ones(2, 16, dtype=torch.long)}
        model(**(pixels if name == "vit" else ids)).logits.float().sum().backward()
        assert met
        learned = dict(attention.named_parameters())
        assert bool(learned) == bool(settings)
        assert {value.dtype for value in met.values()} == {torch.float32}
        assert isinstance(attention, FSDPModule) == bool(settings)
        for parameter in learned.values():  # what the optimizer has
            assert isinstance(parameter, DTensor)
            assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_what_accelerate_would_shard_by_itself(sharding: Callable[..., Any]) -> None:
    """Why `prepare_sharding` names the layers. If this fails, Accelerate has learned it."""
    with pytest.raises(TypeError):
        sharding(converted("bert-classifier"), "no")


@pytest.mark.usefixtures("sharding")
def test_what_fsdp2_cannot_shard() -> None:
    with pytest.raises(RecipeError, match=r"LinAttnBertForMaskedLM: cls\.predictions and .* share a bias"):
        prepare_sharding(converted("bert-mlm"))
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    with pytest.raises(RecipeError, match="must be false"):
        prepare_sharding(converted("gpt2"))


# -- the documents ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("line", LINES)
def test_launch_lines_of_the_documents(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate reads them, and the script is there."""
    monkeypatch.chdir(ROOT)
    args = launch_lines.read(line)
    assert Path(args.training_script).is_file()


def test_there_are_launch_lines() -> None:
    named = {Path(launch_lines.read(line).config_file).stem for line in LINES if "--config_file" in line}
    assert named == set(KINDS)
