"""Tiny decoders in all settings that change what a cache has to keep, and how runs through a cache are compared."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from cases import CAUSAL_KINDS, VOCAB, ModelCase, bert_config, gpt2_config, largest, ready
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, BertLMHeadModel, GPT2LMHeadModel

import hf_linattn
from hf_linattn.integrations.attach import family_layers

WINDOW = 8
TOLERANCE = 1e-4  # of logits of a few units, in float32
PAD = 0
# Their proposals read queries, which a cache of keys does not hold.
READ_QUERIES = ("eva-queries", "eva-conventions", "eva-bounded-queries")
STATIC_KEEPS_KEYS = Version(transformers.__version__) < Version("5.14")


def _gpt2(**changes: Any) -> Any:
    # Untied from the input embeddings: with tied ones a model without training repeats its last token.
    return gpt2_config(**{"n_positions": 400, "tie_word_embeddings": False, **changes})


def _bert(**changes: Any) -> Any:
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD, "tie_word_embeddings": False}
    return bert_config(**{"is_decoder": True, "max_position_embeddings": 400, **tokens, **changes})


GPT2 = ModelCase("gpt2", GPT2LMHeadModel, _gpt2, AutoModelForCausalLM, is_causal=True)
BERT = ModelCase("bert", BertLMHeadModel, _bert, AutoModelForCausalLM, is_causal=True)
DECODERS = [GPT2, BERT]


class Setting(NamedTuple):
    """A kind with settings in which a cache keeps something else than in the others."""

    name: str
    kind: str
    changes: dict[str, Any]


QUERIES_AND_SPREAD = {"proposals": "sum", "weighting": "spread"}
SETTINGS = [
    Setting("favor_plus", "favor_plus", {}),
    Setting("favor_plus-no-window", "favor_plus", {"window_size": 0}),
    Setting("favor_plus-overlap", "favor_plus", {"overlap_window": True}),
    Setting("favor_plus-learned", "favor_plus", {"learned": True, "overlap_window": True}),
    Setting("favor_plus-relu", "favor_plus", {"kernel": "relu", "window_size": 0}),
    Setting("favor_sharp", "favor_sharp", {}),
    Setting("favor_sharp-learned", "favor_sharp", {"learned": True}),
    Setting("favor_sharp-no-window", "favor_sharp", {"window_size": 0, "variant": "dense"}),
    Setting("lara", "lara", {}),
    Setting("lara-no-window", "lara", {"window_size": 0}),
    Setting("lara-overlap", "lara", {"overlap_window": True}),
    Setting("eva", "eva", {}),
    Setting("eva-learned", "eva", {"learned": True, "overlap_window": True}),
    Setting("eva-overlap", "eva", {"overlap_window": True}),
    Setting("eva-published", "eva", {"chunking": "published"}),
    Setting("eva-spread-table", "eva", {"weighting": "spread", "relative_position": "table"}),
    Setting("eva-overlap-t5", "eva", {"overlap_window": True, "relative_position": "t5"}),
    Setting("eva-queries", "eva", {"proposals": "sum"}),
    Setting("eva-conventions", "eva", {"conventions": "published", "overlap_window": True}),
    Setting("eva-bounded", "eva", {"max_chunks": 3}),
    Setting("eva-bounded-queries", "eva", {"max_chunks": 2, "overlap_window": True, **QUERIES_AND_SPREAD}),
]
SETTINGS += [Setting(kind, kind, {}) for kind in CAUSAL_KINDS if kind not in {setting.kind for setting in SETTINGS}]
BY_NAME = {setting.name: setting for setting in SETTINGS}
KINDS = [setting for setting in SETTINGS if setting.name == setting.kind]


# All windows, all kinds of slots and chunks, but not each with each: the others take part in the slow tests.
QUICK = {
    "favor_plus",
    "favor_plus-learned",
    "favor_plus-relu",
    "favor_sharp-no-window",
    "lara-overlap",
    "eva",
    "eva-bounded",
    "eva-learned",
    "eva-overlap-t5",
    "eva-queries",
}


def params(settings: Sequence[Setting], quick: Container[str]) -> list[Any]:
    """Settings to parametrise a test over; those that are not in `quick` are marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(s, id=s.name, marks=[] if s.name in quick else slow) for s in settings]


both = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in DECODERS])
every_setting = pytest.mark.parametrize("setting", params(SETTINGS, BY_NAME))
all_settings = pytest.mark.parametrize("setting", params(SETTINGS, QUICK))
all_kinds = pytest.mark.parametrize("setting", params(KINDS, BY_NAME))
# Where kinds hardly differ: one that reads through slots, one that reads summaries.
some_kinds = pytest.mark.parametrize("setting", params(KINDS, ("favor_plus", "eva")))
static_states = pytest.mark.skipif(STATIC_KEEPS_KEYS, reason="before 5.14 every static cache keeps keys and values")


def decoder(
    case: ModelCase, setting: Setting, *, layers: list[int] | None = None, config: dict[str, Any] | None = None
) -> Any:
    """A converted decoder, with random values for what it could learn (maps, offsets, tables): at first they are 0."""
    model = case.build(**(config or {}))
    model = hf_linattn.convert(model, case.settings(setting.kind, **setting.changes), layers=layers)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".linattn." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return ready(model)


def prompt(batch: int = 2, tokens: int = 45, *, seed: int = 1) -> Tensor:
    """Token ids without special ones."""
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(paddings: Sequence[int], tokens: int, *, seed: int = 2) -> dict[str, Tensor]:
    """A batch whose rows have the given amounts of padding before them."""
    ids = prompt(len(paddings), tokens, seed=seed)
    mask = (torch.arange(tokens) >= torch.tensor(paddings)[:, None]).long()
    return {"input_ids": ids * mask + PAD * (1 - mask), "attention_mask": mask}


def run(model: Any, new_tokens: int, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Token ids `[batch, prompt + new]`, and the logits `[batch, new, vocabulary]` that they were chosen from."""
    inputs.setdefault("do_sample", False)
    out = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


def whole_logits(model: Any, ids: Tensor) -> Tensor:
    """All logits of sequences without padding, from one forward without a cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def check_replay(model: Any, sequences: Tensor, chosen_from: Tensor, paddings: Sequence[int] | None = None) -> None:
    """What generation chose from is what one forward of each row, alone and without padding, says about it."""
    new = chosen_from.shape[1]
    for row, ids in enumerate(sequences):
        real = ids[paddings[row] if paddings else 0 :]
        expected = whole_logits(model, real[None])[0, -new - 1 : -1]
        error = largest(chosen_from[row] - expected)
        assert error < TOLERANCE, f"row {row}: logits differ by {error:.1e}"
        assert torch.equal(real[-new:], expected.argmax(-1)), f"row {row}: another token"


@contextmanager
def query_lengths(model: Any) -> Iterator[list[int]]:
    """Tokens that the first attention layer is given, call by call."""
    seen: list[int] = []
    layer = family_layers(model)[0]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        yield seen
    finally:
        handle.remove()


def is_recurrent(cache: Any) -> list[bool]:
    """Of each layer of a cache, whether it is one of constant size."""
    cache = getattr(cache, "self_attention_cache", cache)
    return [type(layer).__name__ in ("RecurrentLayer", "StaticRecurrentLayer") for layer in cache.layers]
