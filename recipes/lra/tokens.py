"""Token ids of the tasks: bytes of texts and images, words of ListOps. Id 0 pads."""

from __future__ import annotations

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .listops import WORDS

PAD, UNKNOWN = "[PAD]", "[UNK]"


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token per byte of the text in UTF-8: byte b has the id b + 1. No marks at the ends."""
    letters = bytes_to_unicode()  # how `tokenizers` writes a byte
    vocabulary = {PAD: 0, **{letters[byte]: byte + 1 for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, pad_token=PAD)


def grey_ids(image: Image.Image) -> list[int]:
    """Ids of the grey levels of an image, row by row, in the vocabulary of `byte_tokenizer`."""
    return (np.asarray(image.convert("L"), dtype=np.int64).reshape(-1) + 1).tolist()


def listops_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """The 15 words of ListOps; round parentheses, which the published files have, are left out."""
    vocabulary = {word: index for index, word in enumerate((PAD, UNKNOWN, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("(", " "), normalizers.Replace(")", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, pad_token=PAD, unk_token=UNKNOWN
    )
