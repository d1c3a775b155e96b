"""Small checkpoints with the file layout of three well-known ones on the Hub, for a rehearsal without the Hub.

Names and kinds of tensors, config.json and the files of the tokenizer or image processor are as in the repositories;
sizes are small and the weights random, large enough that attention is far from uniform. The tensors are written down
by name, not saved from a model, so that these files are the same whatever Transformers calls a weight today:

* BERT: `LayerNorm.gamma` and `LayerNorm.beta`, the prefix `bert.`, the heads of pretraining, no tied decoder weight.
* GPT-2: no prefix, the triangles `attn.bias`, no `lm_head`.
* ViT: `vit.encoder.layer.0.attention.attention.query`, a classifier, no pooler.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

LAYERS, HIDDEN, INNER, HEADS = 2, 32, 64, 4
POSITIONS = 512
IMAGE, PATCH, LABELS = 224, 16, 12
END_OF_TEXT = "<|endoftext|>"

Files = dict[str, bytes]


def small_checkpoints(texts: list[str]) -> dict[str, Files]:
    """Repository -> its files.

    Args:
        texts: What the tokenizers take their words from.
    """
    return {
        "google-bert/bert-base-uncased": bert(texts),
        "openai-community/gpt2": gpt2(texts),
        "google/vit-base-patch16-224": vit(),
    }


def bert(texts: list[str]) -> Files:
    tokenizer = _word_pieces(texts)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    fill = _Fill(seed=1)
    for name, rows in {"word": len(vocab), "position": POSITIONS, "token_type": 2}.items():
        fill.matrix(f"bert.embeddings.{name}_embeddings.weight", rows, HIDDEN)
    fill.old_norm("bert.embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"bert.encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            fill.linear(f"{at}.attention.self.{name}", HIDDEN, HIDDEN)
        fill.linear(f"{at}.attention.output.dense", HIDDEN, HIDDEN)
        fill.old_norm(f"{at}.attention.output.LayerNorm")
        fill.linear(f"{at}.intermediate.dense", INNER, HIDDEN)
        fill.linear(f"{at}.output.dense", HIDDEN, INNER)
        fill.old_norm(f"{at}.output.LayerNorm")
    fill.linear("bert.pooler.dense", HIDDEN, HIDDEN)
    fill.vector("cls.predictions.bias", len(vocab))
    fill.linear("cls.predictions.transform.dense", HIDDEN, HIDDEN)
    fill.old_norm("cls.predictions.transform.LayerNorm")
    fill.linear("cls.seq_relationship", 2, HIDDEN)
    config = {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": POSITIONS,
        "model_type": "bert",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": len(vocab),
    }
    return {
        "config.json": _json(config),
        "model.safetensors": fill.file(),
        "vocab.txt": ("\n".join(word for word, _ in vocab) + "\n").encode(),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json({"do_lower_case": True, "model_max_length": POSITIONS}),
    }


def gpt2(texts: list[str]) -> Files:
    tokenizer = _byte_pairs(texts)
    vocab = tokenizer.get_vocab()
    fill = _Fill(seed=2)
    fill.matrix("wte.weight", len(vocab), HIDDEN)
    fill.matrix("wpe.weight", POSITIONS, HIDDEN)
    triangle = torch.ones(POSITIONS, POSITIONS).tril()[None, None]
    for layer in range(LAYERS):
        at = f"h.{layer}"
        fill.norm(f"{at}.ln_1")
        fill.tensors[f"{at}.attn.bias"] = triangle.clone()
        fill.projection(f"{at}.attn.c_attn", HIDDEN, 3 * HIDDEN)
        fill.projection(f"{at}.attn.c_proj", HIDDEN, HIDDEN)
        fill.norm(f"{at}.ln_2")
        fill.projection(f"{at}.mlp.c_fc", HIDDEN, 4 * HIDDEN)
        fill.projection(f"{at}.mlp.c_proj", 4 * HIDDEN, HIDDEN)
    fill.norm("ln_f")
    end = vocab[END_OF_TEXT]
    config = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": end,
        "embd_pdrop": 0.1,
        "eos_token_id": end,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": POSITIONS,
        "n_embd": HIDDEN,
        "n_head": HEADS,
        "n_layer": LAYERS,
        "n_positions": POSITIONS,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": len(vocab),
    }
    generation = {
        "_from_model_config": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "transformers_version": "4.26.0",
    }
    model = json.loads(tokenizer.to_str())["model"]
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    return {
        "config.json": _json(config),
        "generation_config.json": _json(generation),
        "model.safetensors": fill.file(),
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": _json({"model_max_length": POSITIONS}),
    }


def vit() -> Files:
    fill = _Fill(seed=3)
    fill.tensors["vit.embeddings.cls_token"] = fill.random(1, 1, HIDDEN)
    fill.tensors["vit.embeddings.position_embeddings"] = fill.random(1, (IMAGE // PATCH) ** 2 + 1, HIDDEN)
    fill.tensors["vit.embeddings.patch_embeddings.projection.weight"] = fill.random(HIDDEN, 3, PATCH, PATCH) / PATCH
    fill.vector("vit.embeddings.patch_embeddings.projection.bias", HIDDEN)
    for layer in range(LAYERS):
        at = f"vit.encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            fill.linear(f"{at}.attention.attention.{name}", HIDDEN, HIDDEN)
        fill.linear(f"{at}.attention.output.dense", HIDDEN, HIDDEN)
        fill.linear(f"{at}.intermediate.dense", INNER, HIDDEN)
        fill.linear(f"{at}.output.dense", HIDDEN, INNER)
        fill.norm(f"{at}.layernorm_before")
        fill.norm(f"{at}.layernorm_after")
    fill.norm("vit.layernorm")
    fill.linear("classifier", LABELS, HIDDEN)
    labels = [f"label number {number}" for number in range(LABELS)]
    config = {
        "_name_or_path": "google/vit-base-patch16-224",
        "architectures": ["ViTForImageClassification"],
        "attention_probs_dropout_prob": 0.0,
        "encoder_stride": PATCH,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": HIDDEN,
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "image_size": IMAGE,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "label2id": {label: number for number, label in enumerate(labels)},
        "layer_norm_eps": 1e-12,
        "model_type": "vit",
        "num_attention_heads": HEADS,
        "num_channels": 3,
        "num_hidden_layers": LAYERS,
        "patch_size": PATCH,
        "qkv_bias": True,
        "transformers_version": "4.13.0.dev0",
    }
    processor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTFeatureExtractor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": IMAGE, "width": IMAGE},
    }
    return {
        "config.json": _json(config),
        "model.safetensors": fill.file(),
        "preprocessor_config.json": _json(processor),
    }


class _Fill:
    """Random tensors by name; the same ones for a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def matrix(self, name: str, rows: int, columns: int) -> None:
        self.tensors[name] = self.random(rows, columns) * 0.3

    def vector(self, name: str, size: int) -> None:
        self.tensors[name] = self.random(size) * 0.1

    def linear(self, name: str, outputs: int, inputs: int) -> None:
        self.matrix(f"{name}.weight", outputs, inputs)
        self.vector(f"{name}.bias", outputs)

    def projection(self, name: str, inputs: int, outputs: int) -> None:
        """GPT-2's linear layer, whose weight is the other way round."""
        self.linear(name, inputs, outputs)
        self.vector(f"{name}.bias", outputs)

    def norm(self, name: str, weight: str = "weight", bias: str = "bias") -> None:
        self.tensors[f"{name}.{weight}"] = 1 + self.random(HIDDEN) * 0.2  # not the value of a fresh one
        self.vector(f"{name}.{bias}", HIDDEN)

    def old_norm(self, name: str) -> None:
        """A LayerNorm as TensorFlow's names had it."""
        self.norm(name, "gamma", "beta")

    def file(self) -> bytes:
        return save(self.tensors, metadata={"format": "pt"})


def _word_pieces(texts: Iterable[str], words: int = 400) -> Tokenizer:
    """BERT's tokenizer with the special tokens where bert-base-uncased has them, and the most frequent words."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in text.lower().split():
            counts[word] = counts.get(word, 0) + 1
    frequent = [word for word in sorted(counts, key=lambda word: (-counts[word], word)) if word.isascii()][:words]
    characters = sorted({character for word in counts for character in word if character.isascii()})
    pieces = ["[PAD]", *(f"[unused{number}]" for number in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += [*characters, *(f"##{character}" for character in characters if character.isalnum())]
    pieces = list(dict.fromkeys([*pieces, *frequent]))
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def _byte_pairs(texts: Iterable[str], size: int = 600) -> Tokenizer:
    """GPT-2's tokenizer, trained on the texts; the end of text is its last token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    merges = [(first, second) for first, second in pairs]
    tokenizer.model = models.BPE({**model["vocab"], END_OF_TEXT: len(model["vocab"])}, merges)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
