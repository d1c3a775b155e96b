"""`hf-linattn compare`: how close a model with linear attention is to the same weights under softmax."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..conversion.compare import compare as compare_model
from ..errors import ConfigError
from ..integrations.families import is_converted
from ..modules.registry import config_from_dict
from . import options
from .checkpoints import AS_SAVED, load_model, load_processor
from .output import note, print_json, print_line
from .values import settings_of

EXAMPLE = "Example: hf-linattn compare gpt2-trained --inputs dev.txt --max-length 512 --ablations --plot heads.png"


def compare(
    model: options.Model,
    inputs: options.Inputs,
    kind: Annotated[
        str | None, typer.Option(help=f"For a stock model, without conversion: {options.KINDS}.", show_default=False)
    ] = None,
    settings: options.Settings = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to compare on.")] = 32,
    ablations: Annotated[
        bool,
        typer.Option("--ablations", help="Also what is left with the window alone, the slots alone, shuffled slots."),
    ] = False,
    heads: Annotated[bool, typer.Option("--heads", help="Also tables of the heads.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write heat maps of layers and heads here (png, pdf, svg).", dir_okay=False)
    ] = None,
    column: options.Column = None,
    max_length: options.MaxLength = None,
    pack: options.Pack = True,
    batch_size: options.BatchSize = 8,
    tokenizer: options.Tokenizer = None,
    device: options.Device = None,
    dtype: options.Dtype = AS_SAVED,
    revision: options.Revision = "main",
    json: options.Json = False,
) -> None:
    """Compare a model with its own weights under softmax, layer by layer and as a whole. Prints Markdown tables."""
    from .inputs import InputOptions, read_inputs

    chosen = settings_of(settings or (), "set")
    if chosen and kind is None:
        raise ConfigError("--set belongs to a kind: give --kind.")
    config = None if kind is None else config_from_dict({"kind": kind, **chosen})
    if plot is not None:
        _check_plot(plot)
    given = InputOptions(inputs, column, max_length, pack, batch_size)
    loaded = load_model(model, revision, dtype, device)
    if config is not None:
        _use_natively(loaded, config)
    processor = load_processor(loaded, tokenizer or model, revision)
    read = read_inputs(loaded, processor, given)
    report = compare_model(loaded, read.first(rows), progress=True, ablations=ablations)
    if plot is not None:
        report.plot(plot)
        note(f"written: {plot}")
    if json:
        print_json({"model": model, "data": read.source, "unit": read.unit, **report.to_dict()})
    else:
        print_line(report.to_markdown(heads=heads))


def _use_natively(model: Any, config: Any) -> None:
    """Give a stock model linear attention without conversion."""
    if is_converted(model.config):
        present = model.config.linear_attention["kind"]
        raise ConfigError(f"--kind is for stock models; this one is converted to {present!r}. Leave it out.")
    model.config.linear_attention = config.to_dict()
    model.set_attn_implementation(config.kind)


def _check_plot(path: Path) -> None:
    """Raise `ConfigError` for a picture that could not be written, before any work is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'hf-linattn[plot]'")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ConfigError(f"--plot must end in one of {formats}; got {str(path)!r}.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"--plot {str(path)!r} cannot be written: its folder is not there, or not yours.")
