"""What the experiments of the papers share: real queries and keys, standard errors, and how a claim is judged."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import torch
import typer
from torch import Tensor, nn

from hf_linattn.bench.environment import write_experiment
from hf_linattn.integrations.call import Call
from hf_linattn.integrations.interface import softmax_output
from hf_linattn.integrations.observe import observed_attention

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared  # noqa: E402  (it stands in the folder above)

Seeds = Annotated[int, typer.Option(min=2, help="Repetitions, for the standard errors.")]
Out = Annotated[Path | None, typer.Option(help="JSON file to write.")]
Model = Annotated[
    Path | None, typer.Option(exists=True, help="A BERT checkpoint for real queries and keys; MiniLM-L6 by default.")
]
Tokens = Annotated[int, typer.Option(min=8, help="Tokens of a row of text.")]
Rows = Annotated[int, typer.Option(min=2, help="Rows of text, for the standard errors.")]
Text = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="Text that it reads; the licence by default.")
]

AGREES, DIFFERS, UNDECIDED = "yes", "no", "undecided"
CERTAIN = 2.0  # standard errors


def fail(message: str) -> NoReturn:
    """End the script because of a mistake of its user."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def numbers(text: str, flag: str, end: int) -> list[int]:
    """Numbers from 0 to `end - 1`, separated by commas."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= number < end for number in found):
        fail(f"{flag} must be numbers from 0 to {end - 1}, separated by commas; got {text!r}.")
    return found


# -- statistics -----------------------------------------------------------------------------------------------------
class Estimate(NamedTuple):
    """A mean over repetitions and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        """Both, rounded to the first digit of the error, but to three digits of the mean at least."""
        if not math.isfinite(self.mean):
            return str(self.mean)
        magnitude = math.floor(math.log10(abs(self.mean))) if self.mean else 0
        digits = 2 - magnitude
        if self.error:
            digits = max(digits, min(-math.floor(math.log10(self.error)), 4))
        digits = min(max(digits, 0), 6)
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"


def estimate(values: Sequence[float] | Tensor) -> Estimate:
    values = torch.as_tensor(values, dtype=torch.float64)
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5))


def below(less: Sequence[float] | Tensor, more: Sequence[float] | Tensor) -> str:
    """Whether the first is smaller than the second, pair by pair: yes and no by two standard errors at least."""
    found = estimate(torch.as_tensor(more, dtype=torch.float64) - torch.as_tensor(less, dtype=torch.float64))
    if abs(found.mean) <= CERTAIN * found.error or not found.mean:
        return UNDECIDED
    return AGREES if found.mean > 0 else DIFFERS


# -- claims ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Claim:
    """A line of the table in docs/papers.md.

    source: Where the paper says it. claim: What it says. figure: What was measured here. agrees: "yes", "no",
    "undecided" (less than two standard errors), or in how many of the comparisons.
    """

    source: str
    claim: str
    figure: str
    agrees: str

    @classmethod
    def judged(cls, source: str, claim: str, figure: str, answers: Iterable[str]) -> Claim:
        """A claim that consists of several comparisons (`below`)."""
        found = list(answers)
        if len(set(found)) == 1:
            return cls(source, claim, figure, found[0])
        counts = [f"{found.count(name)} {name}" for name in (AGREES, DIFFERS, UNDECIDED) if name in found]
        return cls(source, claim, figure, ", ".join(counts))


def finish(out: Path | None, settings: dict[str, Any], rows: list[dict[str, Any]], claims: list[Claim]) -> None:
    """Print what was found, and write it down if asked to. Cells of rows are numbers, texts or estimates."""
    for table in dict.fromkeys(row.get("table", "") for row in rows):
        of_table = [{k: v for k, v in row.items() if k != "table"} for row in rows if row.get("table", "") == table]
        shared.print_table(table, [{k: _shown(v) for k, v in row.items()} for row in of_table])
    shared.print_table("Claims", [asdict(claim) for claim in claims], "± is one standard error")
    if out is not None:
        stored = [{k: v._asdict() if isinstance(v, Estimate) else v for k, v in row.items()} for row in rows]
        content = {**settings, "claims": [asdict(claim) for claim in claims], "rows": stored}
        write_experiment(out, content)


def _shown(value: Any) -> Any:
    return str(value) if isinstance(value, Estimate) else value


# -- real queries and keys ------------------------------------------------------------------------------------------
class AttentionInputs(NamedTuple):
    """Of one layer: `[rows, heads, tokens, head_dim]`, unscaled, and the factor of the dot product."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


@torch.no_grad()
def attention_of_text(model: Path | None, text: Path | None, tokens: int, rows: int) -> list[AttentionInputs]:
    """What the layers of a BERT are called with while it reads rows of `tokens` tokens; layer by layer."""
    torch.set_num_threads(1)
    bert, tokenizer = shared.encoder(model)
    if bert.config.model_type != "bert":
        fail(f"--model must be a BERT checkpoint; got one of the type {bert.config.model_type!r}.")
    if tokens > bert.config.max_position_embeddings:
        fail(f"--tokens must be at most {bert.config.max_position_embeddings} with this model; got {tokens}.")
    ids = shared.rows_of(shared.read_tokens(tokenizer, [text or shared.LICENCE]), tokens - 2, rows)
    if len(ids) < rows:
        fail(f"--rows must be at most {len(ids)} with this text and {tokens} tokens a row; got {rows}.")
    found: list[AttentionInputs] = []

    def on_call(module: nn.Module, call: Call) -> Tensor:
        found.append(AttentionInputs(call.query, call.key, call.value, call.scaling))
        return softmax_output(module, call)

    bert.set_attn_implementation("favor_plus")  # looked into, and not used
    with observed_attention(bert, on_call):
        bert(shared.with_ends(tokenizer, ids))
    return found


def relative_error(output: Tensor, exact: Tensor) -> Tensor:
    """`|output - exact| / |exact|` of every row, `[rows]`."""
    return (output - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
