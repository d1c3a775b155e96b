"""LARA: linear randomized attention (Zheng et al. 2022, arXiv:2204.04667)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...ops.favor.random_features import derive_seed, draw_projection
from ...ops.inputs import LARGEST_COUNT
from ...ops.lara.attention import lara_attention
from ...ops.lara.features import IMPORTANCE_WEIGHTINGS
from ...ops.lara.landmarks import MAP_STAGES, MIXINGS
from ...ops.lara.proposals import sample_proposals
from ...ops.lara.recurrent import lara_recurrence
from ...ops.learned import learned_recurrence
from ...ops.noise import NOISE_SCALES
from ...ops.recurrent.slots import SlotRecurrence
from ..config import CONVENTIONS, LearnedConfig, choice, count, factor, flag
from ..contract import CALIBRATED_TOKENS, AttentionInputs, LayerShape, StateTensor, zeros
from ..learned_maps import learned_feature_map, learned_output, learned_spec, learned_start
from ..proposal_maps import PROPOSAL_MAPS, ProposalAttention, proposal_maps, proposal_spec
from ..registry import AttentionKind, register_kind
from ..training_place import common_noise
from .lara_calibration import ProposalCalibration

# Slots per head: landmarks (or calibrated proposals), and learned proposals.
LANDMARKS, LEARNED_PROPOSALS = 64, 32
_TRAINED = "Learned proposals are trained, not drawn."
_WEIGHED = "Every learned proposal has a log-weight of its own."
# Fields that learned proposals leave no or less choice in: what is possible, and why.
_LEARNED = {
    "proposal_source": (("calibrated",), "Learned proposals start from calibrated ones."),
    "proposal_map": (("residual", "none"), "Learned proposals have residual maps, or none."),
    "weighting": (("balance",), _WEIGHED),
    "alpha_coeff": ((1.0,), _WEIGHED),
    "mixing": (("none",), "There are no landmarks to mix."),
    "map_stage": (("mean",), "There are no landmarks; the maps are of all tokens."),
    "sample_noise": ((False,), _TRAINED),
    "noise_scale": (("corrected",), _TRAINED),
    "samples_per_landmark": ((1,), _TRAINED),
    "antithetic": ((False,), _TRAINED),
    "conventions": (("corrected",), "The published LARA has no learned proposals."),
}


@dataclass(frozen=True, kw_only=True)
class LaraConfig(LearnedConfig):
    """Settings of LARA. See `AttentionConfig` for the shared ones.

    Args:
        num_landmarks: Proposals per row: segments of the sequence, or (rounded down to a square) bins of the image.
            Of calibrated proposals the number of centroids per head. `None`: 64, or 32 learned ones.
        proposal_source: "landmarks" of the row itself, or proposals "calibrated" on data (`hf_linattn.calibrate`) and
            fixed. `None`: calibrated in a causal layer, where landmarks would see later tokens, and where proposals
            are learned, which start from them; landmarks otherwise.
        weighting: How samples are weighed: "balance" (balance heuristic), "biased" (towards the query's own
            proposals) or "optimal" (plus a per-query correction). Calibrated proposals know "balance" only.
        alpha_coeff: Strength of the correction of "optimal".
        mixing: "key" mixes the key landmarks with each other by a softmax, "key_value" also counts the size of their
            values, "none" leaves them. Landmarks only.
        proposal_map: Learned map of the queries and keys of each landmark (`modules/proposal_maps.py`). Converted
            models only; native mode has no parameters. Calibrated proposals have no map; there any value but "none"
            only says that the layer learns its mass offset beside exact keys. Learned proposals: "residual" (the
            default) or "none"; the maps are of all queries and keys.
        map_stage: Apply the maps to the "mean" of a landmark, or to its "tokens" before averaging.
        sample_noise: Draw the samples around the proposals in training. In evaluation they are at the means
            (landmarks) or where they were drawn once (calibrated).
        noise_scale: "corrected", the scale that the densities assume, or "published", smaller by `head_dim ** -0.25`.
        samples_per_landmark: Samples of each proposal: of landmarks with noise, of calibrated proposals always.
            `None`: 2 of calibrated proposals, 1 of landmarks.
        antithetic: Every sample also with the opposite noise: twice as many. `None`: if calibrated.
        num_heavy_keys: Keys per head and row that every query sees exactly. Bidirectional only.
        learned: Proposals that are trained (`hf_linattn.training.transfer_attention`), of their own for queries and
            keys, with a log-weight for each; they start from the calibrated ones. Each key spreads one unit of weight
            over them.
        conventions: "corrected" or "published": the defaults of the fields that are `None`.
    """

    kind = "lara"

    num_landmarks: int = count(None)
    proposal_source: str | None = choice(None, ("landmarks", "calibrated"))
    weighting: str | None = choice(None, IMPORTANCE_WEIGHTINGS, ("balance", "optimal"))
    alpha_coeff: float = factor(1.0)
    mixing: str | None = choice(None, MIXINGS, ("none", "none"))
    proposal_map: str | None = choice(None, PROPOSAL_MAPS, ("residual", "linear_norm"))
    map_stage: str | None = choice(None, MAP_STAGES, ("mean", "tokens"))
    sample_noise: bool | None = flag(None, (False, True))
    noise_scale: str | None = choice(None, NOISE_SCALES, NOISE_SCALES)
    samples_per_landmark: int | None = count(None)
    antithetic: bool | None = flag(None)
    num_heavy_keys: int = count(0, minimum=0)
    conventions: str = choice("corrected", CONVENTIONS)

    def __post_init__(self) -> None:
        if self.num_landmarks is None:
            object.__setattr__(self, "num_landmarks", LEARNED_PROPOSALS if self.learned else LANDMARKS)
        super().__post_init__()

    def own_defaults(self, group: str) -> dict[str, Any]:
        is_calibrated = group == "decoder" or self.learned
        source = self.proposal_source or ("calibrated" if is_calibrated else "landmarks")
        values = {**super().own_defaults(group), "proposal_source": source}
        if self.conventions == "published":
            values |= {"window_size": 0, **({"map_stage": "mean"} if group == "vision" else {})}
        # Samples of fixed proposals are drawn once, and several are needed; those of landmarks only with noise.
        is_fixed = source == "calibrated" and not self.learned
        return {**values, "samples_per_landmark": 2 if is_fixed else 1, "antithetic": is_fixed}

    def validate(self) -> None:
        super().validate()
        self._check_even_overlap()
        if self.num_landmarks * (self.samples_per_landmark or 1) > LARGEST_COUNT:
            self.fail("samples_per_landmark", f"such that num_landmarks * samples_per_landmark <= {LARGEST_COUNT}")
        if self.learned:
            for field, (allowed, why) in _LEARNED.items():
                if getattr(self, field) not in (None, *allowed):
                    words = " or ".join(repr(value) for value in allowed)
                    self.fail(field, f"{words} with learned=True", why)


class LaraAttention(ProposalAttention[LaraConfig]):
    """LARA with learned maps of the landmarks, or calibrated proposals; a learned offset beside exact keys.

    With `learned=True` the proposals are trained (`modules/learned_maps.py`).
    """

    kind = "lara"

    @classmethod
    def is_exact_in_window(cls, config: LaraConfig) -> bool:
        return True

    @classmethod
    def check(cls, config: LaraConfig, shape: LayerShape) -> None:
        super().check(config, shape)
        if config.proposal_source != "calibrated":
            if shape.is_causal:
                raise UnsupportedError(
                    "LARA has no causal form with landmarks: they are means over the whole sequence, so every query"
                    " would see later keys. Use proposal_source='calibrated' (or None) and hf_linattn.calibrate, or"
                    " another kind: 'favor_plus', 'favor_sharp' or 'eva'."
                )
            return
        if config.conventions == "published":
            other = "'favor_plus', 'favor_sharp' or 'eva'" if shape.is_causal else "proposal_source='landmarks'"
            raise UnsupportedError(
                "The published LARA knows no calibrated proposals, and so no causal form; got conventions='published'."
                f" Use conventions='corrected', or {other}."
            )
        for field, only in (("weighting", "balance"), ("mixing", "none"), ("noise_scale", "corrected")):
            given = getattr(config, field)
            if given not in (None, only):
                raise UnsupportedError(
                    f"Calibrated proposals fix the samples and their weights, so {field} must be {only!r}; got"
                    f" {given!r}. Leave it None."
                )

    @classmethod
    def state_spec(cls, config: LaraConfig, shape: LayerShape) -> dict[str, StateTensor]:
        spec: dict[str, StateTensor] = {}
        if config.learned or config.proposal_source != "calibrated":
            for side in ("query", "key"):
                spec |= proposal_spec(config.proposal_map, side, shape)
        if config.proposal_source == "calibrated":
            heads, dim, count = shape.num_heads, shape.head_dim, config.num_landmarks
            rows = count * (config.samples_per_landmark or 1)
            seed = derive_seed(config.seed, shape.layer_idx, "lara-noise")
            draw = functools.partial(draw_projection, heads, rows, dim, seed=seed)
            noise = StateTensor((heads, rows, dim), learned=False, draw=draw)
            spec[CALIBRATED_TOKENS] = zeros()
            if config.learned:
                return spec | learned_spec(config, noise)
            spec |= {"centroids": zeros(heads, count, dim), "proposal_noise": noise}
        exact = config.window_size or config.num_global_tokens or config.num_heavy_keys
        if config.proposal_map != "none" and exact:
            spec["mass_offset"] = zeros(shape.num_heads, learned=True)
        return spec

    def recurrence(self, query: Tensor, *, scaling: float) -> SlotRecurrence:
        state = self.tensors()
        if self.config.learned:
            feature_map = learned_feature_map(state, self.config.normalizer)
            return learned_recurrence(feature_map, scaling=scaling, **self.recurrence_options())
        antithetic, offset = bool(self.config.antithetic), state.get("mass_offset")
        proposals = sample_proposals(state["centroids"], state["proposal_noise"], antithetic=antithetic)
        return lara_recurrence(query, proposals, scaling=scaling, offset=offset, **self.recurrence_options())

    def new_calibration(self, stream: int = 0, first_row: int | None = None) -> ProposalCalibration | None:
        if self.config.proposal_source != "calibrated":
            return None
        return ProposalCalibration(self.config.num_landmarks, self.config, self.shape, stream, first_row)

    def learning_start(
        self, inputs: AttentionInputs, mean: Callable[[Tensor, Tensor], Tensor] = torch.div
    ) -> dict[str, Tensor]:
        return learned_start(self.config, self.tensors(), inputs, mean) if self.config.learned else {}

    @classmethod
    def compute(cls, config: LaraConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        if config.learned:
            return learned_output(config, state, inputs)
        draw_noise = bool(inputs.training and config.sample_noise)
        own: dict[str, Any]
        if "centroids" in state:
            noise = state["proposal_noise"]
            if draw_noise:
                noise = common_noise(inputs, noise)
            own = {"proposals": sample_proposals(state["centroids"], noise, antithetic=bool(config.antithetic))}
        else:
            query_map, key_map = proposal_maps(state)
            own = {
                "num_landmarks": config.num_landmarks,
                "weighting": config.weighting,
                "alpha_coeff": config.alpha_coeff,
                "mixing": config.mixing,
                "query_map": query_map,
                "key_map": key_map,
                "map_stage": config.map_stage,
                "noise": draw_noise and (inputs.noise or True),
                "noise_scale": config.noise_scale,
                "samples_per_landmark": config.samples_per_landmark,
                "antithetic": config.antithetic,
            }
        return lara_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            offset=state.get("mass_offset"),
            num_heavy_keys=config.num_heavy_keys,
            **own,
            **cls.call_options(config, inputs),
        )


register_kind(
    AttentionKind(
        name="lara",
        title="LARA",
        paper="arXiv:2204.04667",
        config_cls=LaraConfig,
        module_cls=LaraAttention,
        size_field="num_landmarks",
        causal="calibrated",
        calibrated_field="proposal_source",
        checkpoint_fields=("proposal_source", "learned", "value_convolution"),
        example={"num_landmarks": 8},
    )
)
