"""The section of a model card on attention transfer: what was trained on what, and how close to softmax it came."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, Template
from torch import nn

from ..modules.base import LinearAttention
from ..modules.registry import AttentionKind
from .markup import code, text

# What `compare` found -> title and format of its column. Scores have the title that the record gives them.
COLUMNS = {
    "hidden_cosine": ("cosine of hidden states", "{:.4f}"),
    "logits_kl": ("KL of predictions, nats", "{:.4f}"),
    "argmax_agreement": ("equal predictions", "{:.1%}"),
    "score": ("", "{:.4g}"),
}
CONTROLS = {
    "window_alone": "window alone",
    "slots_alone": "slots alone",
    "shuffled_slots": "slots shuffled",
}


@dataclass(frozen=True)
class TransferRecord:
    """What an attention transfer did, for the model card (`write_card(..., transfer=...)`).

    Args:
        steps: Towards the attention output of softmax.
        second_stage_steps: Towards its hidden states, after these.
        rows_per_step: Rows in a batch, of all processes together.
        rows: What a row is, such as "rows of 512 tokens" or "images".
        data: What the rows are from, by name.
        layers: Indices of the layers that were trained; `None` for all converted ones.
        learning_rate: Of the first step.
        seed: Of the order of the data.
        calibration_rows: Rows that set statistics before; 0 for a kind without any.
        before, after: What `hf_linattn.compare` found on rows that were not trained on (`Report.to_dict()`).
        score_name: What the scores in it are, such as "perplexity".
        verdict: In words, whether the slots matter (`Report.verdict()`).
    """

    steps: int
    rows_per_step: int
    rows: str
    data: str
    learning_rate: float
    seed: int
    calibration_rows: int = 0
    second_stage_steps: int = 0
    layers: Sequence[int] | None = None
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    score_name: str = "score"
    verdict: str | None = None


def transfer_section(record: TransferRecord, model: Any, kind: AttentionKind) -> str:
    """The section, as Markdown."""
    settings = model.config.linear_attention
    layers = [module for module in model.modules() if isinstance(module, LinearAttention)]
    trained = [layer for layer in layers if record.layers is None or layer.shape.layer_idx in record.layers]
    template = importlib.resources.files(__package__).joinpath("transfer.md.jinja").read_text(encoding="utf-8")
    after: Mapping[str, Any] = {"is_window_in_disguise": None, **record.after} if record.after else {}
    section = Template(template, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).render(
        text=text,
        code=code,
        record=record,
        layers=", ".join(map(str, settings["layers"] if record.layers is None else record.layers)),
        trained=f"{_count_parameters(trained):,}",
        parameters=f"{_count_parameters([model]):,}",
        slots=_slots(kind, settings, any(layer.shape.is_causal for layer in layers)),
        has_controls=bool(after.get("ablations")),
        maps_seed=settings.get("seed"),
        compared=after,
        layer_rows=_layer_rows(record.before, after),
        has_shares=any(layer.get("slot_shares") for layer in after.get("layers", [])),
        model_columns=[title or record.score_name for title, _ in _columns(after).values()],
        model_rows=_model_rows(record.before, after),
    )
    return section.strip()


def _count_parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _slots(kind: AttentionKind, settings: Mapping[str, Any], is_causal: bool) -> str:
    """How many there are."""
    chunk = settings.get("chunk_size") if is_causal and kind.bound_field else None
    return f"one for every {chunk} tokens" if chunk else f"{settings.get(kind.size_field)} per head"


def _layer_rows(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Name, errors before and after, share of the mass that goes through slots: of every layer."""
    rows: list[tuple[str, ...]] = []
    for number, layer in enumerate(after.get("layers", [])):
        shares = layer.get("slot_shares")
        rows.append(
            (
                layer["name"],
                f"{before['layers'][number]['error']:.3f}" if before else "",
                f"{layer['error']:.3f}",
                f"{sum(shares) / len(shares):.1%}" if shares else "",
            )
        )
    return rows


def _model_rows(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Title and values of every form of the model that was compared with softmax."""
    forms = {"before transfer": before, "**after transfer**": after}
    forms |= {title: (after.get("ablations") or {}).get(name) for name, title in CONTROLS.items()}
    if after.get("softmax_score") is not None:
        same = {"hidden_cosine": 1.0, "logits_kl": 0.0, "argmax_agreement": 1.0, "score": after["softmax_score"]}
        forms = {"softmax": same, **forms}
    columns = _columns(after).items()
    return [
        (title, ["" if found.get(name) is None else shown.format(found[name]) for name, (_, shown) in columns])
        for title, found in forms.items()
        if found
    ]


def _columns(after: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Those of `COLUMNS` that have a value."""
    return {name: column for name, column in COLUMNS.items() if after.get(name) is not None}
