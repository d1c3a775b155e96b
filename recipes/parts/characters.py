"""Tokenizers with a token for every character, for sequences that are no language."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

UNKNOWN = "⟨unk⟩"
LINE_BREAK = "\n"


def character_tokenizer(
    characters: Sequence[str], max_length: int, *, line_break: str = "", begin: bool = False, **special: str
) -> PreTrainedTokenizerFast:
    """Character i has the id i; special tokens come behind.

    Args:
        max_length: Tokens of a row.
        line_break: The token that a line break is; by default it is none.
        begin: Whether `bos_token` stands in front of every row.
        special: Special tokens by what they are, for example `mask_token="*"`.
    """
    vocabulary = {token: index for index, token in enumerate([*characters, *special.values(), UNKNOWN])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace(LINE_BREAK, line_break)
    tokenizer.decoder = decoders.Fuse()
    if begin:
        first = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, unk_token=UNKNOWN, **special
    )
