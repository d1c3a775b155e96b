"""Keys of a batch that a stock model ignores are ignored; arguments that change attention raise, future ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, BY_NAME, GPT2, KINDS, MODES, VIT, ModelCase, converted, logits, native, supported
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DataCollatorWithPadding,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.models.gpt2 import modeling_gpt2

import hf_linattn
from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.integrations import keywords
from hf_linattn.integrations.keywords import given_by_the_model

CASES = [
    pytest.param(build, kind, case, id=f"{mode.id}-{kind}-{case.name}")
    for mode in MODES
    for build in mode.values
    for kind in KINDS
    for case in (BERT, GPT2, VIT)
    if supported(kind, case, native=build is native)
]
TOKENS_2 = torch.zeros(2, 40, dtype=torch.long)
# What tokenizers, collators, Trainer, `generate` and losses put into a batch, and what nobody has thought of.
EXTRA: dict[str, Any] = {
    "special_tokens_mask": TOKENS_2,
    "offset_mapping": torch.zeros(2, 40, 2, dtype=torch.long),
    "overflow_to_sample_mapping": [0, 1],
    "length": [40, 40],
    "num_truncated_tokens": torch.tensor([0, 0]),
    "idx": torch.arange(2),
    "label_ids": torch.zeros(2, dtype=torch.long),
    "word_ids": [0, 1],
    "return_loss": True,
    "num_items_in_batch": torch.tensor(80),
    "decoder_input_ids": TOKENS_2,
    "completion_mask": TOKENS_2,
    "weight": torch.ones(60),
    "label_smoothing": 0.1,
    "reduction": "mean",
    "ignore_index": -100,
    "shift_labels": TOKENS_2,
    "text": ["a", "b"],
    "a_key_of_tomorrow": 1,
    "kind": torch.tensor([0, 1]),  # names of arguments and of what layers are made with
    "bias": torch.zeros(2),
    "dim": 1,
}


@pytest.mark.parametrize(("build", "kind", "case"), CASES)
def test_extra_keys_change_nothing(build: Any, kind: str, case: ModelCase) -> None:
    model, inputs = build(case, kind), case.inputs()
    want = logits(model, **inputs)
    stock = case.build()
    for name, value in EXTRA.items():
        try:
            stock(**inputs, **{name: value})
        except TypeError:  # the stock model does not take it either
            with pytest.raises(TypeError):
                model(**inputs, **{name: value})
            continue
        assert torch.equal(logits(model, **inputs, **{name: value}), want), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if supported(kind, GPT2)])
@pytest.mark.parametrize(
    "options",
    [
        {"shift_labels": True},
        {"ignore_index": 5},
        {"num_items_in_batch": torch.tensor(7)},
        {"weight": torch.rand(60, generator=torch.Generator().manual_seed(0))},
        {"label_smoothing": 0.3},
        {"reduction": "sum"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_keywords_of_losses_reach_the_loss(kind: str, options: dict[str, Any]) -> None:
    """The loss from the model's own logits, by the stock model's loss function, is the loss that it returns."""
    model, ids = converted(GPT2, kind), GPT2.inputs()["input_ids"]
    given = {**options, "shift_labels": ids.roll(-1, 1)} if "shift_labels" in options else options

    def loss(inputs: dict[str, Any]) -> Any:
        try:
            return model(input_ids=ids, labels=ids, **inputs).loss
        except TypeError as error:  # an argument that this loss does not take
            return str(error)

    with torch.no_grad():
        try:
            want: Any = model.loss_function(model(ids).logits, ids, vocab_size=60, **given)
        except TypeError as error:
            want = str(error)
        assert type(loss(given)) is type(want)
        if isinstance(want, Tensor):
            torch.testing.assert_close(loss(given), want)


def test_generate_with_labels() -> None:
    small: dict[str, Any] = dict(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    both = EncoderDecoderModel(
        encoder=hf_linattn.convert(BertModel(BertConfig(**small)), "eva"),
        decoder=BertLMHeadModel(BertConfig(**small, is_decoder=True, add_cross_attention=True)),
    )
    for config in (both.config, both.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    ids = BERT.inputs()["input_ids"]
    assert both.generate(input_ids=ids, labels=ids[:, :8], max_new_tokens=3).shape[0] == 2


def test_a_trainer_that_keeps_all_columns(tmp_path: Path) -> None:
    case = BY_NAME["bert-classifier"]
    rows = [
        {"input_ids": row.tolist(), "label": index % 2, "length": 40, "idx": index, "special_tokens_mask": [0] * 40}
        for index, row in enumerate(case.inputs(batch=4)["input_ids"])
    ]

    class Tokenizer:  # what the collator asks for
        model_input_names = ("input_ids",)

        def pad(self, features: Any, **kwargs: Any) -> dict[str, Tensor]:
            return {name: torch.tensor([row[name] for row in features]) for name in features[0]}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, remove_unused_columns=False, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(
        converted(case, "eva"), arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(Tokenizer())
    ).train()


# -- what changes attention -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("build", MODES)
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("softcap", 5.0, UnsupportedError),
        ("sliding_window", 4, UnsupportedError),
        ("s_aux", torch.zeros(4), UnsupportedError),
        ("position_bias", torch.zeros(1, 4, 40, 40), UnsupportedError),
    ],
)
def test_what_attention_reads_raises(build: Any, name: str, value: Any, error: type[Exception]) -> None:
    for case in (BERT, GPT2):
        with pytest.raises(error, match=f"Got {name}="):
            build(case, "favor_plus")(**case.inputs(), **{name: value})


def test_what_attention_of_a_future_release_reads_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keywords, "attention_keywords", lambda: frozenset({"temperature_map"}))
    with pytest.raises(UnsupportedError, match="temperature_map=0.5"):
        converted(BERT, "favor_plus")(**BERT.inputs(), temperature_map=0.5)


class GivesMore(modeling_gpt2.GPT2Attention):
    """As the attention module of a future release might be: it gives something to the attention function."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        query, key, value = (
            z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in self.c_attn(hidden_states).chunk(3, -1)
        )
        attend = modeling_gpt2.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        kwargs.pop("encoder_hidden_states", None)
        kwargs = {name: kwargs[name] for name in kwargs if name not in ("cache", "past_key_values", "use_cache")}
        output, _ = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, bias_of_2027=0.5, **kwargs
        )
        return self.c_proj(output.flatten(-2)), None


class SameFile(modeling_gpt2.GPT2Attention):
    """An attention module that is written beside its block."""


class GivesToAll(modeling_gpt2.GPT2Block):
    """A block that gives something to its attention module, which hands it on without knowing it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **{**kwargs, **self.more()})

    def more(self, **kwargs: Any) -> dict[str, Any]:
        return dict(tilt_of_2027=0.5, **kwargs)


# What is compiled takes seconds: by default each mode and each kind once.
COMPILED = [
    pytest.param(build, kind, id=f"{kind}-{mode.id}", marks=[] if place == number else pytest.mark.slow)
    for place, mode in enumerate(MODES)
    for build in mode.values
    for number, kind in enumerate(("favor_plus", "eva"))
]


@pytest.mark.parametrize(
    ("build", "kind", "compiled"),
    [
        pytest.param(*each.values, compiled, id=f"{each.id}-{compiled}", marks=each.marks if compiled else [])
        for compiled in (False, True)
        for each in COMPILED
    ],
)
def test_what_a_module_gives_by_itself_raises(build: Any, kind: str, compiled: bool) -> None:
    model = build(GPT2, kind)
    for block in model.transformer.h:
        block.attn.__class__ = GivesMore
    call = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(Exception, match="bias_of_2027=0.5"):
        call(**GPT2.inputs(), use_cache=False)
    torch.compiler.reset()


def test_what_a_layer_gives_to_its_attention_raises() -> None:
    model = native(GPT2, "favor_plus")
    for block in model.transformer.h:
        block.__class__ = GivesToAll
        block.attn.__class__ = SameFile
    with pytest.raises(UnsupportedError, match="tilt_of_2027=0.5"):
        model(**GPT2.inputs())


def test_without_source_every_unknown_name_raises() -> None:
    base = modeling_gpt2.GPT2Attention
    typed = type("Typed", (base,), {"forward": base.forward, "__module__": "no.such.module"})
    assert given_by_the_model(typed) is None
    model = native(GPT2, "favor_plus")
    for block in model.transformer.h:
        block.attn.__class__ = typed
    with pytest.raises(UnsupportedError, match="length=3"):
        model(**GPT2.inputs(), length=3)


def test_a_class_made_on_the_way_is_read_like_its_base() -> None:
    base = modeling_gpt2.GPT2Attention
    assert given_by_the_model(type("FSDPGPT2Attention", (base,), {})) == given_by_the_model(base)


@pytest.mark.parametrize(("build", "kind"), COMPILED)
def test_compiled_in_one_graph(build: Any, kind: str) -> None:
    model = build(BERT, kind)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = logits(compiled, **BERT.inputs(), length=TOKENS_2[:, 0], return_loss=True)
    torch.testing.assert_close(got, logits(model, **BERT.inputs()), rtol=0, atol=1e-4)
    with pytest.raises(Exception, match="Got softcap=3.0"):
        compiled(**BERT.inputs(), softcap=3.0)
    torch.compiler.reset()


@pytest.mark.parametrize("build", MODES)
def test_the_name_of_our_own(build: Any) -> None:
    with pytest.raises(InputError, match="Rename the key"):
        build(GPT2, "favor_plus")(**GPT2.inputs(), use_cache=False, linattn_cache="x")


def test_other_architectures() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    ).eval()
    model.set_attn_implementation("eva")
    ids = GPT2.inputs()["input_ids"]
    want = logits(model, input_ids=ids)
    assert torch.equal(logits(model, input_ids=ids, special_tokens_mask=TOKENS_2, bias=torch.zeros(2)), want)
