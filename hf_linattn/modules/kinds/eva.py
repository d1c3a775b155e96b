"""EVA: efficient attention via control variates (Zheng et al. 2023, arXiv:2302.04542)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...ops.eva.attention import eva_attention
from ...ops.eva.chunks import CHUNK_WEIGHTINGS, PROPOSALS, Summariser
from ...ops.eva.layout import CHUNKINGS, ChunkOptions, default_chunk
from ...ops.eva.learned import LearnedSummariser, eva_learning_start, learned_eva_attention, learned_eva_recurrence
from ...ops.eva.recurrent import EvaRecurrence, eva_recurrence
from ...ops.inputs import LARGEST_COUNT
from ...ops.noise import NOISE_SCALES, noise_factor
from ..config import CONVENTIONS, LearnedConfig, choice, count, flag
from ..contract import AttentionInputs, LayerShape, StateTensor, zeros
from ..learned_maps import learned_summariser, summariser_spec
from ..proposal_maps import PROPOSAL_MAPS, ProposalAttention, proposal_maps, proposal_spec
from ..registry import AttentionKind, register_kind
from ..value_convolution import with_value_convolution
from .eva_positions import table_entries, window_bias

AUTO = "auto"
# Chunks of a row (bidirectional), and with learned summaries.
CHUNKS, LEARNED_CHUNKS = 128, 32
# With learned summaries these settings have one value: a control variate is not made.
LEARNED_VALUES = {
    "proposals": "key",
    "weighting": "size",
    "chunking": "exclusive",
    "proposal_map": "none",
    "sample_noise": False,
    "noise_scale": "corrected",
    "conventions": "corrected",
}


@dataclass(frozen=True, kw_only=True)
class EvaConfig(LearnedConfig):
    """Settings of EVA. See `AttentionConfig` for the shared ones; `window_size` must be at least 1.

    Args:
        num_chunks: Upper bound of the number of chunks in a bidirectional layer; `None` is 128, or 32 learned ones.
            "published" chunking: chunks have `tokens // num_chunks` tokens, also in a causal layer without
            `chunk_size`.
        chunk_size: Tokens per chunk in a causal layer, a divisor of `window_size`; "auto" is the largest up to 16.
            `None` only with "published" chunking: a prefix then does not give what it gives inside a longer sequence,
            and there is no cache of constant cost.
        max_chunks: In a causal layer with "exclusive" chunking, how many chunks a query reads singly, the latest ones;
            what came before is one summary. The cost per token, and the cache, then do not grow with the context.
            `None`: all of them singly.
        proposals: Where a chunk's proposal stands: "sum" (mean query + mean key), "mean" (half of that), "key" (mean
            key) or "none" (0). `None` takes the default of the model family: "sum" for encoders, "key" for decoders:
            a stock cache, as native mode has, keeps keys only. (The state of a converted layer keeps the queries of
            its window where they are needed.)
        weighting: "size" weighs a chunk by its number of keys; "spread" also by their variance along the query; "none"
            not at all.
        chunking: "exclusive" (every key counts once) or "published" (all chunks are visible, also those that the
            window covers).
        proposal_map: Learned map of the mean query and key of each chunk (`modules/proposal_maps.py`). Converted
            models only; native mode has no parameters.
        relative_position: Learned bias of the window's logits, zero at first: "none", "table" (one per relative
            position and head) or "t5" (one per bucket of distances and head). Converted models only.
        relative_index: "corrected", or "published" for tables trained with the official code
            (`ops/eva/relative_position.py`; its T5 biases are also scaled like the dot product). `None`: that of
            `conventions`.
        relative_dims: 1 if tokens are a sequence, 2 if they are the patches of an image. `None`: that of the family.
        sample_noise: Add standard normal noise to the proposals in training.
        noise_scale: "corrected", the scale that the densities assume, or "published", smaller by `head_dim ** -0.25`.
        conventions: "corrected" or "published": the defaults of the fields that are `None`. Published causal proposals
            need the queries of all tokens: in native mode generate with `use_cache=False`, or set proposals="key".
        learned: Summaries of chunks with pooling weights, residual maps and a mass that are trained
            (`hf_linattn.training.transfer_attention`) instead of control variates. They start as mean keys and mean
            values, weighed by size; `proposals`, `weighting` and `proposal_map` do not apply. Converted models only.
    """

    kind = "eva"

    window_size: int | None = count(None)
    num_chunks: int = count(None)
    chunk_size: int | str | None = count(AUTO, words=(AUTO, None))
    max_chunks: int | None = count(None)
    proposals: str | None = choice(None, PROPOSALS, ("sum", "mean"))
    weighting: str | None = choice(None, CHUNK_WEIGHTINGS, ("size", "none"))
    chunking: str | None = choice(None, CHUNKINGS, ("exclusive", "published"))
    proposal_map: str | None = choice(None, PROPOSAL_MAPS, ("residual", "linear_norm"))
    relative_position: str = choice("none", ("none", "table", "t5"))
    relative_index: str | None = choice(None, CONVENTIONS, CONVENTIONS)
    relative_dims: int | None = count(None, maximum=2)
    sample_noise: bool | None = flag(None, (False, True))
    noise_scale: str | None = choice(None, NOISE_SCALES, NOISE_SCALES)
    conventions: str = choice("corrected", CONVENTIONS)

    def __post_init__(self) -> None:
        if self.num_chunks is None:
            object.__setattr__(self, "num_chunks", LEARNED_CHUNKS if self.learned else CHUNKS)
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        for field, value in LEARNED_VALUES.items():
            if self.learned and getattr(self, field) not in (None, value):
                self.fail(field, f"{value!r} with learned=True", "Learned summaries are pooled, from the keys alone.")
        if self.exact_below and self.relative_position != "none":
            where = f"0 with relative_position={self.relative_position!r}"
            self.fail("exact_below", where, "Short inputs would lose their biases.")

    def own_defaults(self, group: str) -> dict[str, Any]:
        values = {**super().own_defaults(group), "relative_dims": 2 if group == "vision" else 1}
        if group == "decoder":
            # A decoder's cache holds no queries, so its proposals come from the keys alone.
            values["proposals"] = "key" if self.conventions == "corrected" else "sum"
        return values | LEARNED_VALUES if self.learned else values

    def filled(self, defaults: Mapping[str, Any]) -> EvaConfig:
        config = super().filled(defaults)
        if config.chunk_size == AUTO and config.window_size:
            config = config.replace(chunk_size=default_chunk(config.window_size))
        return config


class EvaAttention(ProposalAttention[EvaConfig]):
    """EVA with learned maps of the chunk means, or with learned summaries of the chunks."""

    kind = "eva"

    @classmethod
    def check(cls, config: EvaConfig, shape: LayerShape) -> None:
        super().check(config, shape)
        window, published = config.window_size, config.chunking == "published"
        if shape.is_causal and config.relative_dims == 2:
            config.fail("relative_dims", "1 in a causal layer, which reads a sequence")
        if not window:
            config.fail("window_size", "an integer >= 1", "EVA is a window plus chunks.")
        if shape.is_causal and config.chunk_size is None and not published:
            config.fail("chunk_size", "an integer in a causal layer with chunking='exclusive'")
        if config.max_chunks is not None and not shape.is_causal:
            where = "None in a bidirectional layer, where no chunk is older than another"
            config.fail("max_chunks", where, "Use num_chunks to bound their number.")
        if config.max_chunks is not None and published:
            config.fail("max_chunks", "None with chunking='published'", "Set chunking='exclusive'.")
        if config.relative_position != "none" and table_entries(config, shape.is_causal) > LARGEST_COUNT:
            raise ConfigError(
                f"EvaConfig.relative_position must be 'none' with so large a window: its table would have more than"
                f" {LARGEST_COUNT} entries per head; got window_size={window!r}. Take a smaller window, or 't5'."
            )
        if isinstance(config.chunk_size, int) and shape.is_causal and window % config.chunk_size:
            raise ConfigError(
                f"EvaConfig.chunk_size must divide window_size in a causal layer; got"
                f" chunk_size={config.chunk_size!r} and window_size={window!r}. Set"
                f" chunk_size={default_chunk(window)}, or {AUTO!r}."
            )

    @classmethod
    def is_exact_in_window(cls, config: EvaConfig) -> bool:
        # Published chunks are read beside the window that covers them; biases are no part of softmax attention.
        return config.chunking == "exclusive" and config.relative_position == "none"

    @classmethod
    def check_grid(cls, config: EvaConfig, *, is_image: bool) -> None:
        super().check_grid(config, is_image=is_image)
        if config.relative_position != "none" and config.relative_dims == 2 and not is_image:
            config.fail("relative_dims", "1 in a model of sequences")

    @classmethod
    def state_spec(cls, config: EvaConfig, shape: LayerShape) -> dict[str, StateTensor]:
        spec = summariser_spec(config, shape) if config.learned else proposal_spec(config.proposal_map, "key", shape)
        if config.proposals in ("sum", "mean"):
            spec |= proposal_spec(config.proposal_map, "query", shape)
        if config.relative_position != "none":
            spec["relative_table"] = zeros(shape.num_heads, table_entries(config, shape.is_causal), learned=True)
        return spec

    @classmethod
    def supports_recurrence(cls, config: EvaConfig, *, is_causal: bool) -> bool:
        # Without a length of their own, chunks change with every token.
        return super().supports_recurrence(config, is_causal=is_causal) and config.chunk_size is not None

    def recurrence(self, query: Tensor, *, scaling: float) -> EvaRecurrence:
        state, shared = self.tensors(), self.recurrence_options()
        options = _layout_options(self.config, state, scaling, None, is_causal=True)
        if self.config.learned:
            return learned_eva_recurrence(learned_summariser(state), scaling=scaling, **options, **shared)
        return eva_recurrence(scaling=scaling, **options, **_variate_options(self.config, state), **shared)

    @classmethod
    def compute(cls, config: EvaConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        tokens = inputs.query, inputs.key, inputs.value
        options = _layout_options(config, state, inputs.scaling, inputs.grid, is_causal=inputs.is_causal)
        options |= {"num_chunks": config.num_chunks, **cls.call_options(config, inputs)}
        if config.learned:
            output = learned_eva_attention(*tokens, learned_summariser(state), **options)
            return with_value_convolution(output, config, state, inputs)
        return eva_attention(
            *tokens,
            noise=bool(inputs.training and config.sample_noise) and (inputs.noise or True),
            noise_scale=config.noise_scale,
            **_variate_options(config, state),
            **options,
        )

    def layout_and_summaries(
        self, *, scaling: float
    ) -> tuple[ChunkOptions, Summariser | LearnedSummariser, Tensor | None]:
        """How windows and chunks lie, what summarises a chunk, and `window_bias`, of a bidirectional layer that reads
        sequences."""
        config, state = self.config, self.tensors()
        side = "both" if config.overlap_window else None
        options = ChunkOptions(config.window_size or 0, config.num_chunks, None, config.chunking or "", side, False)
        options.check(None)
        bias = _layout_options(config, state, scaling, None, is_causal=False)["window_bias"]
        if config.learned:
            return options, learned_summariser(state), bias
        variates = _variate_options(config, state)
        del variates["chunking"]
        factor = noise_factor(config.noise_scale or "", scaling)
        summarise = Summariser(**variates, root=scaling**0.5, noise_factor=factor)
        summarise.check()
        return options, summarise, bias

    def learning_start(
        self, inputs: AttentionInputs, mean: Callable[[Tensor, Tensor], Tensor] = torch.div
    ) -> dict[str, Tensor]:
        if not self.config.learned:
            return {}
        state = self.tensors()
        options = _layout_options(self.config, state, inputs.scaling, inputs.grid, is_causal=inputs.is_causal)
        options |= {"num_chunks": self.config.num_chunks, **self.call_options(self.config, inputs)}
        # Softmax has neither: the offset is that of the layer without them.
        del options["window_bias"], options["slot_dropout"], options["real_first"]
        return eva_learning_start(inputs.query, inputs.key, learned_summariser(state), mean=mean, **options)


def _layout_options(
    config: EvaConfig, state: Mapping[str, Tensor], scaling: float, grid: tuple[int, int] | None, *, is_causal: bool
) -> dict[str, Any]:
    """Arguments about chunks and windows that all forms share; the settings are filled in."""
    table = state.get("relative_table")
    return {
        "chunk_size": config.chunk_size if is_causal else None,
        "max_chunks": config.max_chunks,
        "window_bias": None if table is None else window_bias(config, table, grid, scaling, is_causal=is_causal),
    }


def _variate_options(config: EvaConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `eva_attention` and its recurrent form about control variates."""
    query_map, key_map = proposal_maps(state)
    return {
        "chunking": config.chunking,
        "proposals": config.proposals,
        "weighting": config.weighting,
        "query_map": query_map,
        "key_map": key_map,
    }


register_kind(
    AttentionKind(
        name="eva",
        title="EVA",
        paper="arXiv:2302.04542",
        config_cls=EvaConfig,
        module_cls=EvaAttention,
        size_field="num_chunks",
        causal="yes",
        overlap_on_grids=True,
        needs_window=True,
        checkpoint_fields=("relative_index", "relative_dims", "learned", "value_convolution"),
        bound_field="max_chunks",
        cost="linearly with the number of tokens for a given window and number of chunks",
        example={"num_chunks": 8, "chunk_size": 4},
    )
)
