"""How much variance FAVOR#'s variants take out of the random features, on a real model and a real text.

    python experiments/second_moment.py TEXT_FILE --model MODEL

Prints, per layer, the mean over heads and pairs of tokens of `log( E[F^2] / exp(2 x.y) )` in nats, where `F` is one
feature's estimate of the softmax kernel `exp(x.y)`: the log of how many features a typical kernel value needs.
Closed form (`hf_linattn.ops.favor.variance`), so nothing is random. The statistics are those of the text itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import shared
import torch
import typer
from torch import Tensor, nn

from hf_linattn.integrations.call import Call
from hf_linattn.integrations.interface import softmax_output
from hf_linattn.integrations.observe import observed_attention
from hf_linattn.ops.favor.statistics import FAVOR_VARIANTS, favor_statistics
from hf_linattn.ops.favor.variance import mean_log_second_moment


@torch.no_grad()
def queries_and_keys(path: Path | None, text: str, tokens: int) -> list[tuple[Tensor, Tensor, float]]:
    """Query, key and scaling of every attention layer, for the first `tokens` tokens of the text."""
    found: list[tuple[Tensor, Tensor, float]] = []
    model, tokenizer = shared.encoder(path)
    model.set_attn_implementation("favor_plus")  # looked into, and not used

    def on_call(module: nn.Module, call: Call) -> Tensor:
        found.append((call.query, call.key, call.scaling))
        return softmax_output(module, call)

    with observed_attention(model, on_call):
        model(**tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt"))
    return found


def measure(layers: list[tuple[Tensor, Tensor, float]]) -> dict[str, list[float]]:
    """Rows of the table: the mean log second moment per layer."""
    rows = {"favor+": [float(mean_log_second_moment(q, k, None, scaling=s).mean()) for q, k, s in layers]}
    for variant in FAVOR_VARIANTS:
        for centring in (False, True):
            values = rows.setdefault(variant + (" + centring" if centring else ""), [])
            for query, key, scaling in layers:
                found = favor_statistics(query, key, scaling=scaling, variant=variant, centring=centring)
                values.append(float(mean_log_second_moment(query, key, found, scaling=scaling).mean()))
    return rows


def main(
    text_file: Annotated[Path, typer.Argument(help="Any plain text, long enough for --tokens", exists=True)],
    model: Annotated[Path | None, typer.Option(help="Name or folder of a model (default: MiniLM-L6)")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to use")] = 512,
) -> None:
    """Mean log relative second moment of the kernel estimate, per layer and variant."""
    layers = queries_and_keys(model, text_file.read_text(encoding="utf-8"), tokens)
    rows = []
    for name, values in (found := measure(layers)).items():
        gain = min(base - value for base, value in zip(found["favor+"], values, strict=True))
        columns = {f"layer {index}": round(value, 1) for index, value in enumerate(values)}
        rows.append({"variant": name, **columns, "least gain": round(gain, 1)})
    shared.print_table(f"{layers[0][0].shape[2]} tokens of {text_file.name}, in nats", rows)


if __name__ == "__main__":
    typer.run(main)
