"""`hf-linattn calibrate`: statistics of data for the layers of a converted model."""

from __future__ import annotations

from typing import Annotated

import typer

from ..bench.workload import choose
from ..conversion import calibrate as calibrate_model
from ..conversion.calibrate import ATTENTIONS
from ..modules.contract import CALIBRATED_TOKENS
from . import options
from .checkpoints import AS_SAVED, check_output, load_model, load_processor, save
from .embedders import embedder_files
from .output import print_json, print_line

EXAMPLE = "Example: hf-linattn calibrate gpt2-sharp gpt2-ready --inputs train.txt --max-length 512"


def calibrate(
    model: options.Model,
    out: options.Output,
    inputs: options.Inputs,
    rows: Annotated[int, typer.Option(min=1, help="Rows to read: some ten thousand tokens are enough.")] = 64,
    attention: Annotated[
        str, typer.Option(help="What the layers run with meanwhile: softmax, or linear for a model trained since.")
    ] = ATTENTIONS[0],
    column: options.Column = None,
    max_length: options.MaxLength = None,
    pack: options.Pack = True,
    batch_size: options.BatchSize = 8,
    tokenizer: options.Tokenizer = None,
    device: options.Device = None,
    dtype: options.Dtype = AS_SAVED,
    revision: options.Revision = "main",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Set what the layers of a converted model take from data, and save it: FAVOR# and LARA, mainly in decoders."""
    from .inputs import InputOptions, read_inputs

    choose("--attention", attention, ATTENTIONS)
    check_output(out, overwrite)
    given = InputOptions(inputs, column, max_length, pack, batch_size)
    loaded = load_model(model, revision, dtype, device)
    processor, beside = load_processor(loaded, tokenizer or model, revision), embedder_files(model, revision)
    read = read_inputs(loaded, processor, given)
    calibrate_model(loaded, read.first(rows), attention=attention, progress=True)
    save(loaded, processor, out, beside=beside, cards=model)
    tokens = max(int(count) for name, count in loaded.named_buffers() if name.endswith(CALIBRATED_TOKENS))
    if json:
        kind = loaded.config.linear_attention["kind"]
        print_json({"model": model, "output": out, "kind": kind, "data": read.source, "tokens": tokens})
    else:
        print_line(f"Saved to {out}: {type(loaded).__name__}, calibrated on {tokens:,} tokens of {read.source}.")
