"""Inputs that a tiny model may take, guessed from the names of its forward's arguments and from its config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BATCH, TOKENS, FRAMES = 2, 12, 4


def find(config: Any, *names: str) -> Any:
    """The first of the fields that a config, or a part of it, has."""
    parts = [config, *(getattr(config, part, None) for part in type(config).sub_configs)]
    for name in names:
        for part in parts:
            value = getattr(part, name, None) if part is not None else None
            if isinstance(value, (int, list, tuple)) and value:
                return value
    return None


def _side(config: Any) -> tuple[int, int]:
    size = find(config, "image_size", "img_size", "input_size") or 32
    if isinstance(size, int):
        return size, size
    numbers = [int(number) for number in size][-2:]
    return (numbers[0], numbers[-1])


def _ids(config: Any, tokens: int = TOKENS, rows: int = BATCH) -> Tensor:
    vocabulary = find(config, "vocab_size")
    vocabulary = vocabulary if isinstance(vocabulary, int) else 20
    return torch.randint(min(5, vocabulary - 1), max(vocabulary - 12, 6), (rows, tokens)).clamp(max=vocabulary - 1)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def values(config: Any) -> dict[str, list[Any]]:
    """Argument -> functions that make it, likeliest first."""
    channels = find(config, "num_channels", "in_channels", "in_chans")
    channels = channels if isinstance(channels, int) else 3
    height, width = _side(config)
    mels = find(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "num_mel", "input_dim")
    mels = mels if isinstance(mels, int) else 16
    positions = find(config, "max_source_positions")
    length = 2 * positions if isinstance(positions, int) and positions <= 256 else 64
    longest = find(config, "max_length")
    longest = longest if isinstance(longest, int) else length
    hidden = find(config, "hidden_size", "d_model", "embed_dim", "n_embd") or 64
    hidden = hidden if isinstance(hidden, int) else hidden[0]
    series = find(config, "patch_length") or 4  # eight patches or more, where a model has any
    series = 8 * series if isinstance(series, int) else 32
    documents = find(config, "n_docs")
    documents = documents if isinstance(documents, int) else 2
    patch = find(config, "patch_size")
    patch = patch if isinstance(patch, int) else 8
    frames = find(config, "num_frames")
    frames = frames if isinstance(frames, int) and frames <= 16 else FRAMES
    return {
        "input_ids": [lambda: _ids(config)],
        "decoder_input_ids": [lambda: _ids(config, 9)],
        "pixel_values": [
            lambda: _random(BATCH, channels, height, width),
            lambda: _random(BATCH, frames, channels, height, width),
            lambda: _random(BATCH, 3, 64, 64),
            lambda: _random(BATCH, 16, channels * patch * patch),
            lambda: _random(16, channels * patch * patch),
            lambda: _random(16, 2 * channels * patch * patch),
        ],
        "pixel_values_videos": [lambda: _random(BATCH, frames, channels, height, width)],
        "flattened_patches": [lambda: _random(BATCH, 16, channels * patch * patch + 2)],
        "input_features": [
            lambda: _random(BATCH, mels, length),
            lambda: _random(BATCH, length, mels),
            lambda: _random(BATCH, 1, 64, mels),
            lambda: _random(mels, length),
        ],
        "input_values": [
            lambda: _random(BATCH, 4000),
            lambda: _random(BATCH, 1, 4000),
            lambda: _random(BATCH, mels, length),
            lambda: _random(BATCH, length, mels),
            lambda: _random(BATCH, longest, mels),
            lambda: _ids(config),
        ],
        "inputs_embeds": [lambda: _random(BATCH, TOKENS, hidden)],
        "hidden_states": [
            lambda: _random(BATCH, TOKENS, hidden),
            lambda: _random(BATCH * TOKENS, hidden),
            lambda: _random(16, 2 * channels * patch * patch),
        ],
        "bbox": [lambda: torch.randint(0, 3, (BATCH, TOKENS, 4)).sort(-1).values],
        "encoder_hidden_states": [lambda: _random(BATCH, TOKENS + 3, hidden)],
        "query_embeds": [lambda: _random(BATCH, 8, hidden)],
        "query_states": [lambda: _random(BATCH, 8, hidden)],
        "grid_thw": [lambda: torch.tensor([[1, 4, 4]])],
        "image_grid_thw": [lambda: torch.tensor([[1, 4, 4]])],
        "past_values": [
            lambda: _random(BATCH, series),
            lambda: _random(BATCH, 32),
            lambda: _random(BATCH, 32, 1),
        ],
        "context_input_ids": [lambda: _ids(config, rows=BATCH * documents)],
        "context_attention_mask": [lambda: torch.ones(BATCH * documents, TOKENS, dtype=torch.long)],
        "doc_scores": [lambda: _random(BATCH, documents)],
        "time_series": [lambda: _random(BATCH, 32)],
        "noisy_latents": [lambda: _random(BATCH, hidden)],
        "bool_masked_pos": [lambda: torch.zeros(BATCH, 16, dtype=torch.bool)],
        "spatial_shapes": [lambda: torch.tensor([[4, 4]] * BATCH)],
        "pixel_attention_mask": [lambda: torch.ones(BATCH, 16, dtype=torch.long)],
        "patch_attention_mask": [lambda: torch.ones(BATCH, 4, 4, dtype=torch.bool)],
        "feature_lens": [lambda: torch.tensor([length])],
        "position_ids": [lambda: torch.arange(TOKENS)[None].expand(BATCH, -1)],
    }


def candidates(model: Any, config: Any) -> Iterator[dict[str, Tensor]]:
    """Sets of arguments to try, likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    made = values(config)
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    main = getattr(model, "main_input_name", "input_ids")
    sets: list[list[str]] = []
    if "input_ids" in parameters and "input_ids" not in required:
        sets.append(["input_ids", "decoder_input_ids"])
        sets.append(["input_ids"])
        sets.append(["input_ids", "context_input_ids", "context_attention_mask", "doc_scores"])
        sets.append(["input_ids", "bbox"])
        sets.append(["input_ids", "pixel_values"])
    sets.append([main])
    sets.append([main, "decoder_input_ids"])
    sets += [["pixel_values"], ["input_features"], ["input_values"], ["inputs_embeds"], ["hidden_states"]]
    sets += [["hidden_states", "encoder_hidden_states"], ["pixel_values", "spatial_shapes", "pixel_attention_mask"]]
    seen = set()
    for names in sets:
        wanted = tuple(dict.fromkeys([*(n for n in names if n in parameters), *required]))
        if not wanted or wanted in seen or any(name not in made for name in wanted):
            continue
        seen.add(wanted)
        count = max(len(made[name]) for name in wanted)
        for index in range(count):
            torch.default_generator.manual_seed(1)
            yield {name: made[name][min(index, len(made[name]) - 1)]() for name in wanted}
