"""`hf-linattn transfer`: train the learned maps of a converted model towards softmax, without labels."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from ..conversion.compare import compare as compare_model
from ..errors import ConfigError
from ..hub import TransferRecord
from ..training.trained_layers import check_learning_rate, trained_layers
from ..training.transfer import LEARNING_RATES, TransferStep, transfer_attention
from . import options
from .checkpoints import check_calibrated, check_output, load_model, load_processor, save
from .embedders import embedder_files
from .output import print_json, print_line, print_table
from .values import layer_list

EXAMPLE = "Example: hf-linattn transfer gpt2-favor gpt2-trained --inputs train.parquet --max-length 512 --steps 200"


def transfer(
    model: options.Model,
    out: options.Output,
    inputs: options.Inputs,
    steps: Annotated[int, typer.Option(min=0, help="Towards the attention output of softmax, layer by layer.")] = 200,
    second_stage: Annotated[
        int, typer.Option(min=0, help="Steps after these, of all layers together towards its hidden states.")
    ] = 0,
    learning_rate: Annotated[float | None, typer.Option(show_default=f"{LEARNING_RATES['attention']:g}")] = None,
    second_learning_rate: Annotated[
        float | None, typer.Option(help="Of the second stage.", show_default=f"{LEARNING_RATES['hidden_states']:g}")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 0,1,4-5.", show_default="all converted ones")] = None,
    row_weight: Annotated[
        float, typer.Option(min=0.0, help="Weight of the cross-entropy of attention rows; for short inputs.")
    ] = 0.0,
    held_out: Annotated[
        int, typer.Option(min=0, help="First rows, kept out of training, to compare with softmax before and after.")
    ] = 32,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Compare also the window alone, the slots alone, and shuffled slots.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the rows.")] = 0,
    data_name: Annotated[
        str | None, typer.Option(help="What the data is called on the model card.", show_default="names of the files")
    ] = None,
    column: options.Column = None,
    max_length: options.MaxLength = None,
    pack: options.Pack = True,
    batch_size: options.BatchSize = 4,
    tokenizer: options.Tokenizer = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    revision: options.Revision = "main",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Train the learned maps of a converted model towards softmax, without labels, and save it with a model card.

    For several processes, mixed precision, and runs that go on where they were cut off:
    recipes/attention_transfer.py.
    """
    from .inputs import InputOptions, read_inputs

    started = time.perf_counter()
    if not (steps or second_stage):
        raise ConfigError("Nothing to do: --steps and --second-stage are both 0.")
    if ablations and not held_out:
        raise ConfigError("--ablations are compared on rows that are held out: give --held-out, at least 1.")
    for rate in (learning_rate, second_learning_rate):
        check_learning_rate(0.0 if rate is None else rate)
    indices = layer_list(layers, "layers")
    check_output(out, overwrite)
    given = InputOptions(inputs, column, max_length, pack, batch_size)
    loaded = load_model(model, revision, dtype, device)
    chosen = list(trained_layers(loaded, indices))
    check_calibrated(loaded, model)
    processor, beside = load_processor(loaded, tokenizer or model, revision), embedder_files(model, revision)
    read = read_inputs(loaded, processor, given)
    training = read.after(held_out)
    training.first(1)  # an endless stream of nothing would never end
    batches = iter(training.shuffled(seed).endless())

    def compared(**more: Any) -> Any:
        return compare_model(loaded, read.first(held_out), progress=True, **more) if held_out else None

    before = compared()
    first: list[TransferStep] = []
    second: list[TransferStep] = []
    if steps:
        first = transfer_attention(
            loaded,
            batches,
            steps=steps,
            learning_rate=learning_rate,
            layers=indices,
            row_weight=row_weight,
            progress=True,
        )
    if second_stage:
        second = transfer_attention(
            loaded,
            batches,
            steps=second_stage,
            learning_rate=second_learning_rate,
            target="hidden_states",
            layers=indices,
            progress=True,
        )
    after = compared(ablations=ablations)

    record = TransferRecord(
        steps=steps,
        second_stage_steps=second_stage,
        rows_per_step=batch_size,
        rows=read.unit,
        data=data_name or read.source,
        layers=indices,
        learning_rate=LEARNING_RATES["attention"] if learning_rate is None else learning_rate,
        seed=seed,
        before=before and before.to_dict(),
        after=after and after.to_dict(),
        verdict=None if after is None or after.is_window_in_disguise is None else after.verdict(),
    )
    save(loaded, processor, out, beside=beside, cards=model, transfer=record)
    result = {
        "model": model,
        "output": out,
        "kind": loaded.config.linear_attention["kind"],
        "data": record.data,
        "unit": read.unit,
        "batch_size": batch_size,
        "steps": steps,
        "second_stage": second_stage,
        "layers": _errors(chosen, first or second),
        "before": record.before,
        "after": record.after,
        "seconds": round(time.perf_counter() - started, 2),
    }
    if json:
        print_json(result)
    else:
        _show(result, loaded.config.linear_attention["layers"])


def _errors(layers: list[int], trained: list[TransferStep]) -> list[dict[str, Any]]:
    """Of every layer the error in the first and in the last step of the stage that trained it by itself."""
    ends = zip(layers, trained[0].errors, trained[-1].errors, strict=True)
    return [{"layer": layer, "first_step": first, "last_step": last} for layer, first, last in ends]


def _show(result: dict[str, Any], converted: list[int]) -> None:
    """The errors of the layers: on held-out rows before and after, or else in the first and the last step."""
    rows: Iterable[tuple[int, float, float]]
    if result["after"]:
        errors = [[layer["error"] for layer in result[when]["layers"]] for when in ("before", "after")]
        rows = zip(converted, *errors, strict=True)
        title = f"Error beside softmax on {result['after']['rows']} {result['unit']} that were not trained on"
    else:
        rows = ((layer["layer"], layer["first_step"], layer["last_step"]) for layer in result["layers"])
        title = "Error beside softmax in the first and in the last step"
    shown = [(str(layer), f"{before:.3f}", f"{after:.3f}") for layer, before, after in rows]
    print_line(title)
    print_table(("layer", "before", "after"), shown)
    print_line(f"Saved to {result['output']} with a model card, after {result['seconds']:.0f} seconds.")
