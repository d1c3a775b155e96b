"""The model card of a converted model: rendered from its config, parsed by the Hub.

Works on plain data (`config.linear_attention`, the names of classes), so it knows nothing of Transformers' internals.
"""

from __future__ import annotations

import importlib.resources
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import ConfigError
from ..modules.registry import get_kind
from .header import BrokenCardError, add_tags, is_hub_name, join_card, read_card, source_metadata, split_card
from .markup import code, links, string, text
from .transfer import TransferRecord, transfer_section

logger = logging.getLogger(__name__)

MARK = "<!-- This card is written by hf_linattn."
GENERATED = (
    MARK,
    "model that has been pushed on the Hub. This model card has been automatically generated",
    "This model card has been generated automatically according to the information the Trainer had access to",
)

# Suffix of the class name -> (Auto class, pipeline tag of the Hub). Longer suffixes first: "Model" ends many names.
HEADS: dict[str, tuple[str, str | None]] = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForMultipleChoice": ("AutoModelForMultipleChoice", "multiple-choice"),
    "ForNextSentencePrediction": ("AutoModelForNextSentencePrediction", None),
    "ForPreTraining": ("AutoModelForPreTraining", None),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForMaskedImageModeling": ("AutoModelForMaskedImageModeling", None),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "DoubleHeadsModel": ("", None),
    "ViTModel": ("AutoModel", "image-feature-extraction"),
    "Model": ("AutoModel", "feature-extraction"),
}
UNNAMED = "path/or/name"  # of a card whose repository was not known when it was written
NOT_SETTINGS = {"version", "kind", "layers", "attention_dropout"}


def write_card(model: Any, folder: str | os.PathLike[str], **facts: Any) -> Path:
    """Write `README.md` for `model` into `folder`. Takes the facts of `render_card`. Returns the path.

    A README that a person wrote keeps its text; only metadata that it lacks is added. One that this function or
    Transformers generated is replaced, and so is a link, whose target is not read. One with a broken header stays as
    it is, with a warning.
    """
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        own = read_card(path) if path.is_file() and not path.is_symlink() else None
        content = card_for(model, own, **facts)
    except BrokenCardError as error:
        logger.warning("No model card is written: %s", error)
        return path
    # Written beside and moved: a reader never sees half a card.
    draft = path.with_name(".README.md.tmp")
    draft.write_text(content, encoding="utf-8")
    draft.replace(path)
    return path


def card_for(model: Any, own: str | None, **facts: Any) -> str:
    """The rendered card, or the one that a person wrote (`own`) with the metadata that its header lacks."""
    rendered = render_card(model, **facts)
    if own is None or any(mark in own for mark in GENERATED):
        return rendered
    header, body = split_card(own)
    ours, _ = split_card(rendered)
    tags = ours.pop("tags")
    ours.pop("model-index", None)
    return add_tags(join_card({**ours, **{k: v for k, v in header.items() if v is not None}}, body), tags)


def name_repository(content: str, repo_id: str) -> str:
    """A card of this library that was written before the name of the repository was known, with the name in it."""
    if MARK not in content:
        return content
    return content.replace(f"from_pretrained({string(UNNAMED)})", f"from_pretrained({string(repo_id)})", 1)


def render_card(
    model: Any,
    *,
    repo_id: str | None = None,
    base_model: str | list[str] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    transfer: TransferRecord | None = None,
    notes: str | None = None,
) -> str:
    """The model card (YAML header and text) of a converted model.

    Args:
        model: A converted model: `model.config.linear_attention` names the kind, its settings and the layers.
        repo_id: Name on the Hub, for the snippet and the title.
        base_model: Hub name of the model this one was made from. Default: where it was loaded from, if that is on the
            Hub, else what the card there says.
        license, language: Default: those of the card of the base model, where that is at hand without a download.
        metrics: Name -> value, shown as a table and listed in the header.
        dataset, split: What the metrics were measured on; `dataset` is a name on the Hub or plain text.
        transfer: What an attention transfer did; a section of its own.
        notes: More text (Markdown), put after the results.
    Raises: ConfigError if the model is not converted.
    """
    config = model.config
    settings = getattr(config, "linear_attention", None)
    if not settings:
        raise ConfigError(
            f"A model card can be written for a converted model; {type(model).__name__} has no "
            "`config.linear_attention`. Convert it first with `hf_linattn.convert`."
        )
    class_name = type(model).__name__
    kind = get_kind(settings["kind"])
    source = getattr(config, "_name_or_path", "") or ""
    known = source_metadata(source, MARK)
    base_model = base_model or known.get("base_model") or (source if is_hub_name(source) else None)
    bases = [base_model] if isinstance(base_model, str) else list(base_model or ())
    on_hub = [name for name in bases if is_hub_name(name)]
    heads = (head for suffix, head in HEADS.items() if class_name.endswith(suffix))
    auto_class, pipeline_tag = next(heads, ("AutoModel", None))
    model_name = repo_id or f"{(bases or [class_name])[0].rsplit('/', 1)[-1]}-{kind.name.replace('_', '-')}"
    shown = {name: _number(value) for name, value in (metrics or {}).items()}

    data = ModelCardData(
        base_model=on_hub[0] if len(on_hub) == 1 else on_hub or None,
        library_name="transformers",
        license=license or known.get("license"),
        language=language or known.get("language"),
        pipeline_tag=pipeline_tag,
        tags=["linear-attention", "hf_linattn", kind.name],
        metrics=list(shown) or None,
        datasets=[dataset] if dataset and is_hub_name(dataset) else None,
        **_eval_results(model_name, pipeline_tag, dataset, split, metrics),
    )
    template = importlib.resources.files(__package__).joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    layers = list(settings.get("layers") or [])
    others = [i for i in range(getattr(config, "num_hidden_layers", 0)) if i not in layers]
    total = len(layers) + len(others)
    card = ModelCard.from_template(
        data,
        template_str=template,
        text=text,
        code=code,
        string=string,
        made_from=links(on_hub, "https://huggingface.co") or ", ".join(map(text, bases)),
        model_name=model_name,
        class_name=class_name,
        repo_id=repo_id or UNNAMED,
        auto_class=auto_class or class_name,
        kind=kind.name,
        kind_title=kind.title,
        cost=kind.cost,
        paper=kind.paper,
        paper_url="https://arxiv.org/abs/" + kind.paper.removeprefix("arXiv:"),
        layers=layers,
        layers_text=f"{len(layers)} of {total} layers" if others else f"all {total} layers",
        other_layers=", ".join(map(str, others)),
        settings={k: v for k, v in settings.items() if k not in NOT_SETTINGS},
        attention_dropout=settings.get("attention_dropout"),
        max_positions=getattr(config, "max_position_embeddings", None),
        metrics=shown,
        dataset=dataset,
        split=split,
        transfer=None if transfer is None else transfer_section(transfer, model, kind),
        is_compared=transfer is not None and transfer.after is not None,
        notes=notes,
    )
    return str(card)


def _eval_results(
    model_name: str, task: str | None, dataset: str | None, split: str | None, metrics: Mapping[str, float] | None
) -> dict[str, Any]:
    """The `model-index` of the header, for which the Hub wants to know the task and the data."""
    if not (task and dataset and metrics):
        return {}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=name,
            metric_value=float(value),
        )
        for name, value in metrics.items()
    ]
    return {"model_name": model_name, "eval_results": results}


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
