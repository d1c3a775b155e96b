"""Text in, text out: pipelines, chats and streamers use the cache of a converted model without being told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import cache_of
from cases import VOCAB
from decoders import BERT, GPT2, KINDS, PAD, Setting, all_kinds, decoder, prompt, query_lengths
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[BOS]", "[UNK]", *(f"w{index}" for index in range(3, VOCAB))]
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", unk_token="[UNK]", padding_side="left"
    )
    outer.chat_template = CHAT
    return outer


def words(*lengths: int) -> list[str]:
    texts = [prompt(1, length, seed=number)[0].tolist() for number, length in enumerate(lengths)]
    return [" ".join(f"w{index}" for index in ids) for ids in texts]


@all_kinds
def test_text_generation(setting: Setting) -> None:
    """Texts of different lengths in one batch get what each gets alone, and steps of one token are taken."""
    model = decoder(GPT2, setting)
    texts = words(5, 31, 18)
    # None of the special tokens, which decoding would leave out.
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "suppress_tokens": [0, 1, 2]}
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    with query_lengths(model) as lengths:
        together = generate(texts, batch_size=3, **options)
    assert lengths == [31, *[1] * 8]
    full = generate(texts, use_cache=False, **options)
    for text, batched, recomputed in zip(texts, together, full, strict=True):
        assert batched == recomputed
        said = batched[0]["generated_text"]
        assert said.startswith(text)
        assert said.count("w") == text.count("w") + 9


def test_chat_pipeline() -> None:
    model = decoder(GPT2, KINDS[0])
    messages = [{"role": "user", "content": words(12)[0]}]
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    for _ in range(2):
        answered = generate(messages, **options)[0]["generated_text"]
        assert answered == generate(messages, use_cache=False, **options)[0]["generated_text"]
        messages = [*answered, {"role": "user", "content": words(12, 7)[1]}]


@all_kinds
def test_saved_and_loaded(setting: Setting, tmp_path: Path) -> None:
    """A checkpoint says nothing of its cache: a loaded model has one as the saved one had."""
    model = decoder(BERT, setting)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert "layer_types" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = prompt(2, 19)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    ours, theirs = model.generate(ids, **options), loaded.generate(ids, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(cache_of(ours).layers, cache_of(theirs).layers, strict=True):
        assert type(mine) is type(other)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert generate(words(8)[0], max_new_tokens=3, do_sample=False)[0]["generated_text"]


@pytest.mark.parametrize("name", ["favor_plus", "eva"])
def test_streamers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, own = decoder(GPT2, Setting(name, name, {})), tokenizer()
    ids = prompt(1, 14)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [PAD, 1, 2]}
    expected = own.decode(model.generate(ids, **options, use_cache=False)[0, 14:])

    model.generate(ids, **options, streamer=TextStreamer(own, skip_prompt=True))
    assert capsys.readouterr().out.split() == expected.split()

    streamer = TextIteratorStreamer(own, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs={**options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).split() == expected.split()
    assert len(pieces) > 4
