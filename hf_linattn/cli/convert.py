"""`hf-linattn convert`: linear attention for a pretrained model, and softmax again for a converted one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.workload import choose
from ..conversion import convert as convert_model
from ..conversion import extend_positions, needs_calibration
from ..conversion import revert as revert_model
from ..conversion.positions import METHODS
from ..errors import ConfigError
from ..integrations.families import is_converted
from ..modules.registry import config_from_dict
from .checkpoints import AS_SAVED, check_output, find_processor, load_model, save
from .embedders import embedder_files
from .options import KINDS, Dtype, Json, Model, Output, Overwrite, Revision, Settings
from .output import note, print_json, print_line
from .values import layer_list, settings_of

EXAMPLE = (
    "Example: hf-linattn convert openai-community/gpt2 gpt2-favor --kind favor_plus --learned --set window_size=64"
)


def convert(
    model: Model,
    out: Output,
    kind: Annotated[str | None, typer.Option(help=f"{KINDS}.", show_default=False)] = None,
    learned: Annotated[
        bool, typer.Option("--learned", help="Maps that `transfer` trains, in place of random ones.")
    ] = False,
    settings: Settings = None,
    layers: Annotated[
        str | None, typer.Option(help="Such as 0,1,4-5; the others keep softmax.", show_default="all")
    ] = None,
    revert: Annotated[
        bool, typer.Option("--revert", help="Back to the stock class and softmax, before anything else.")
    ] = False,
    extend_to: Annotated[
        int | None, typer.Option("--extend-positions", min=1, help="Longest input in tokens, for BERT and GPT-2.")
    ] = None,
    extend_method: Annotated[
        str, typer.Option("--extend-method", help=f"How to make the new positions: {' or '.join(METHODS)}.")
    ] = "tile",
    base_model: Annotated[
        str | None, typer.Option(help="Hub name for the model card, if MODEL is a folder.", show_default=False)
    ] = None,
    dtype: Dtype = AS_SAVED,
    revision: Revision = "main",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Replace the softmax attention of a BERT, GPT-2 or ViT, and save the model with its tokenizer.

    It keeps the head it was saved with. A folder of sentence-transformers stays one.
    """
    chosen = settings_of(settings or (), "set")
    if learned and chosen.setdefault("learned", True) is not True:
        raise ConfigError(f"--learned contradicts --set learned={chosen['learned']}.")
    if kind is None and (chosen or layers):
        raise ConfigError(f"--learned, --set and --layers belong to a kind: give --kind, one of {KINDS}.")
    if kind is None and not revert and extend_to is None:
        raise ConfigError(f"Nothing to do: give --kind ({KINDS}), --revert or --extend-positions.")
    config = None if kind is None else config_from_dict({"kind": kind, **chosen})
    indices = layer_list(layers, "layers")
    choose("--extend-method", extend_method, METHODS)
    check_output(out, overwrite)

    source = model
    loaded = load_model(source, revision, dtype, device="cpu")
    if config is not None and is_converted(loaded.config) and not revert:
        present = loaded.config.linear_attention["kind"]
        raise ConfigError(f"{source!r} is converted to {present!r} already. Give --revert to convert it anew.")
    processor, beside = find_processor(loaded, source, revision), embedder_files(source, revision)
    if revert:
        loaded = revert_model(loaded)
    if config is not None:
        loaded = convert_model(loaded, config, layers=indices)
    if extend_to is not None:
        loaded = extend_positions(loaded, extend_to, method=extend_method)
        if processor is not None:
            processor.model_max_length = extend_to
    if processor is None:
        note(f"There is no tokenizer or image processor in {source!r}, so none is saved.")
    save(loaded, processor, out, beside=beside, max_length=extend_to, base_model=base_model)
    result = _result(loaded, source, out)
    if json:
        print_json(result)
    else:
        print_line(_summary(result))


def _result(model: Any, source: str, out: Path) -> dict[str, Any]:
    """What became of the model, as plain JSON values."""
    settings = dict(getattr(model.config, "linear_attention", None) or {})
    return {
        "model": source,
        "output": out,
        "class": type(model).__name__,
        "kind": settings.pop("kind", None),
        "layers": settings.pop("layers", []),
        "settings": settings,
        "positions": getattr(model.config, "max_position_embeddings", None),
        "parameters": model.num_parameters(),
        "needs_calibration": bool(settings) and needs_calibration(model),
    }


def _summary(result: dict[str, Any]) -> str:
    """The result in words, with what comes next."""
    out = result["output"]
    what = f"{result['class']}, {result['parameters']:,} parameters"
    if result["kind"]:
        what += f", {result['kind']} in layers {', '.join(map(str, result['layers']))}"
    lines = [f"Saved to {out}: {what}."]
    if result["needs_calibration"]:
        lines.append(f"It needs statistics of data: hf-linattn calibrate {out} OUT --inputs FILE")
    if result["settings"].get("learned"):
        after = " once it has them" if result["needs_calibration"] else ""
        lines.append(f"Its maps are to be trained{after}: hf-linattn transfer {out} OUT --inputs FILE")
    return "\n".join(lines)
