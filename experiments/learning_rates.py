"""How learned maps of a decoder train: the error of single layers by learning rate, and by where training starts.

    python experiments/learning_rates.py --model GPT2 --train train.parquet --test test.parquet

The queries, keys and values of some layers are kept for a few batches of text; each layer then learns from them alone.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer

import hf_linattn
from hf_linattn.bench.environment import write_experiment
from hf_linattn.integrations.observe import observed_attention
from hf_linattn.modules.base import AttentionInputs, LinearAttention
from hf_linattn.modules.learned_maps import parameter_groups
from hf_linattn.modules.registry import get_kind

Call = tuple[AttentionInputs, Tensor]  # of a layer, with what softmax gives, `[batch, heads, tokens, head_dim]`


def pieces(ids: Tensor, length: int) -> Iterator[Tensor]:
    """Batches `[4, length]` of random pieces of a text, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.stack([ids[i : i + length] for i in torch.randint(len(ids) - length, (4,), generator=generator)])


def calls_of(model: Any, batches: Iterator[Tensor], count: int) -> list[list[Call]]:
    """What every layer is called with while the model computes softmax, batch by batch."""
    found: list[list[Call]] = []

    def on_call(module: Any, call: Any) -> Tensor:
        inputs = AttentionInputs(call.query, call.key, call.value, None, call.scaling, call.is_causal)
        options = {"scaling": call.scaling, "is_causal": call.is_causal}
        output = hf_linattn.functional.softmax_attention(call.query, call.key, call.value, **options)
        found[-1].append((inputs, output))
        return output.transpose(1, 2)

    with torch.no_grad(), observed_attention(model, on_call):
        for batch in itertools.islice(batches, count):
            found.append([])
            model(input_ids=batch)
    return found


def error_of(layer: LinearAttention[Any], call: Call) -> Tensor:
    """Squared error of the output over the variance of softmax's, a mean over heads."""
    inputs, target = call
    output = layer(inputs.query, inputs.key, inputs.value, scaling=inputs.scaling)
    error = (output - target).square().sum((0, 2, 3))
    return (error / (target - target.mean((0, 2), keepdim=True)).square().sum((0, 2, 3))).mean()


def start(layer: LinearAttention[Any], inputs: AttentionInputs, slot_bias: bool) -> None:
    """Put a layer where training starts; with `slot_bias=False` the slot bias does not make up for the shift."""
    first = layer.learning_start(inputs)
    if not slot_bias and "slot_bias" in first:
        before = layer.tensors()["slot_bias"].detach()
        layer.set_tensors({"slot_bias": 2 * before - first["slot_bias"]})
        first = layer.learning_start(inputs)
    layer.set_tensors(first)


def train(layer: LinearAttention[Any], calls: list[Call], steps: int, rate: float, adapter_rate: float) -> None:
    groups = parameter_groups([layer], rate)
    for group in groups:
        group["lr"] = rate if group["lr"] == rate else rate * adapter_rate
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for step in range(steps):
        optimizer.zero_grad()
        error_of(layer, calls[step % len(calls)]).backward()
        optimizer.step()
        schedule.step()


def main(
    model: Annotated[Path, typer.Option(help="A GPT-2 with its tokenizer.")],
    train_text: Annotated[Path, typer.Option("--train", help="Text to train on.")],
    test_text: Annotated[Path, typer.Option("--test", help="Text to measure on.")],
    kinds: Annotated[str, typer.Option(help="Kinds, separated by commas.")] = "favor_plus,favor_sharp,lara,eva",
    rates: Annotated[str, typer.Option(help="Learning rates, separated by commas.")] = "0.01,0.03",
    adapter_rates: Annotated[str, typer.Option(help="Those of residual maps, relative to the others.")] = "0.3,1",
    normalizer: Annotated[str, typer.Option(help="Of FAVOR+ and FAVOR#: slots or kernel.")] = "slots",
    slot_bias: Annotated[bool, typer.Option(help="Start with a slot bias that makes up for the shift.")] = True,
    layers: Annotated[str, typer.Option(help="Layers, separated by commas.")] = "1,4",
    steps: Annotated[int, typer.Option(min=1)] = 60,
    batches: Annotated[int, typer.Option(min=4, help="Different batches to train on.")] = 12,
    length: Annotated[int, typer.Option(min=64, help="Tokens of a row.")] = 512,
    out: Annotated[Path | None, typer.Option(help="JSON of the results.")] = None,
) -> None:
    """Errors of layers before and after training, of text that they have not seen."""
    stock, tokenizer = shared.decoder(model, length), AutoTokenizer.from_pretrained(model)
    observed = hf_linattn.convert(stock, "favor_plus", copy=True)
    calls, test = (
        calls_of(observed, pieces(shared.read_tokens(tokenizer, [text]), length), count)
        for text, count in ((train_text, batches), (test_text, 1))
    )
    rows: list[dict[str, Any]] = []
    for kind, rate, adapter_rate in itertools.product(kinds.split(","), rates.split(","), adapter_rates.split(",")):
        record = get_kind(kind)
        fields = {"normalizer": normalizer} if "normalizer" in record.config_cls.__dataclass_fields__ else {}
        made = hf_linattn.convert(stock, record.config_cls(learned=True, **fields), copy=True)
        before, after = [], []
        for index in map(int, layers.split(",")):
            layer, own = made.transformer.h[index].attn.linattn, [batch[index] for batch in calls]
            if (calibration := layer.new_calibration()) is not None:
                for inputs, _ in own[:4]:
                    calibration.update(inputs)
                layer.set_tensors(calibration.result())
            start(layer, own[0][0], slot_bias)
            with torch.no_grad():
                before.append(float(error_of(layer, test[0][index]).sqrt()))
            train(layer, own, steps, float(rate), float(adapter_rate))
            with torch.no_grad():
                after.append(float(error_of(layer, test[0][index]).sqrt()))
        row = {"kind": kind, "rate": float(rate), "adapter rate": float(adapter_rate)}
        rows.append(row | {"start": statistics.mean(before), "error": statistics.mean(after)})
    shared.print_table(f"Relative error of layers {layers} after {steps} steps", rows)
    if out is not None:
        settings = {"steps": steps, "layers": layers, "normalizer": normalizer, "slot_bias": slot_bias}
        write_experiment(out, {**settings, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
