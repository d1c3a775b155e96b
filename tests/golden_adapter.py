"""Reference vectors of the published implementations, answered by the public functions of the library.

`run_case` reads a case's settings and inputs and says how the library is asked for the same thing. It uses no names of
cases and no stored answers. `tests/golden/README.md` describes the vectors that are shipped; others of the same format
can be run through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_linattn.functional import eva_attention, favor_attention, lara_attention, randomized_attention

Tensors = Mapping[str, Tensor]
MIS_TYPES = {"mis-bh": "balance", "mis-biased": "biased", "mis-opt": "optimal"}
RA_PROPOSALS = {-1: "softmax_mean", 0: "mean", 1: "sampled"}


def run_case(case: dict[str, Any], tensors: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    """The library's answer to one variant of one case.

    Args:
        case: Entry of an index of cases: `mechanism`, `settings`, `variants`.
        tensors: `q`, `k`, `v` `[batch, heads, tokens, head_dim]`, the cotangent `g`, `mask` `[batch, tokens]` (True =
            padding), parameters `param.*`, draws `<variant>.noise` or `<variant>.projection`.
        variant: "eval", "train", "eval_mask" or "train_mask".
    Returns: float64 `out` and, where the variant has gradients, `dq`, `dk`, `dv`.
    """
    settings, mechanism = case["settings"], case["mechanism"]
    query, key, value = (tensors[name].double().requires_grad_() for name in ("q", "k", "v"))
    masked = variant.endswith("_mask")
    real = ~tensors["mask"] if masked else None
    noise = tensors.get(f"{variant}.noise", False) if variant.startswith("train") else False
    arguments = ARGUMENTS[mechanism](settings, tensors, variant)
    if not mechanism.startswith("favor"):
        arguments |= {"noise": noise, "noise_scale": "published", "scaling": settings["scale"]}
    out = FUNCTIONS[mechanism](query, key, value, key_mask=real, **arguments)
    answer = {"out": out.detach()}
    if case["variants"][variant].get("gradients"):
        cotangent = tensors["g"].double()
        if real is not None:
            cotangent = cotangent * real[:, None, :, None]
        grads = torch.autograd.grad((out * cotangent).sum(), (query, key, value))
        answer |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return answer


# -- settings of the published code -> arguments of ours -----------------------------------------------------------
def _favor(settings: Mapping[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    projection = tensors[f"{variant.removesuffix('_mask')}.projection"].double()
    return {"projection": projection, "is_causal": settings["causal"]}


def _ra(settings: Mapping[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    index = next((tensors[name] for name in (f"{variant}.key_index", "key_index") if name in tensors), None)
    return {"proposal": RA_PROPOSALS[settings["num_samples"]], "key_index": index}


def _lara(settings: Mapping[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    generator = settings["proposal_gen"]
    grid = (settings["H"], settings["W"]) if "H" in settings else None
    mixing = "key_value" if generator.endswith("-vmixed") else "key" if generator.endswith("-mixed") else "none"
    several = settings["use_multisample"]
    return {
        "num_landmarks": settings["num_landmarks"],
        "grid": grid,
        "weighting": MIS_TYPES[settings["mis_type"]],
        "alpha_coeff": settings["alpha_coeff"],
        "query_map": _map(tensors, "q_bar_gen"),
        "key_map": _map(tensors, "k_bar_gen"),
        "map_stage": "tokens" if generator.startswith("adaptive") else "mean",
        "mixing": mixing if grid else "none",
        "samples_per_landmark": 2 if several else 1,
        "antithetic": settings["use_antithetics"] and not several,
    }


def _eva(settings: Mapping[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    grid = (settings["H"], settings["W"]) if settings["attn_2d"] else None
    return {
        **_eva_common(settings, tensors),
        "proposals": "none" if settings["adaptive_proj"] == "none" else "mean",
        "num_chunks": settings["num_landmarks"],
        "grid": grid,
    }


def _causal_eva(settings: Mapping[str, Any], tensors: Tensors, variant: str) -> dict[str, Any]:
    return {
        **_eva_common(settings, tensors),
        "proposals": "sum",
        "chunk_size": settings["chunk_size"],
        **({"num_chunks": settings["num_chunks"]} if settings["num_chunks"] else {}),
        "is_causal": settings["causal"],
        "overlap_side": "left" if settings["overlap_window"] else None,
    }


def _eva_common(settings: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    return {
        "window_size": settings["window_size"],
        "overlap_window": settings["overlap_window"],
        "chunking": "published",
        "weighting": "none",
        "query_map": _map(tensors, "adaptive_mu_q"),
        "key_map": _map(tensors, "adaptive_mu_k"),
        "window_bias": _window_bias(settings, tensors),
    }


def _window_bias(settings: Mapping[str, Any], tensors: Tensors) -> Tensor | None:
    """`[heads or 1, window tokens, slots]` from the published table and its index."""
    if settings["use_t5_rpe"]:
        table = tensors["param.rel_pos_bias.table"].double()
        return settings["scale"] * table[tensors["t5_buckets"]].movedim(-1, 0)
    if settings.get("use_rpe"):
        table = tensors["param.local_relative_position_bias_table"].double()
        return table[tensors["rpe_index"]].movedim(-1, 0) if "rpe_index" in tensors else table
    return None


def _map(tensors: Tensors, name: str) -> Callable[[Tensor], Tensor] | None:
    """A linear map and, if it has one, its layer norm; over the concatenated heads if it is that wide."""
    weight, bias = tensors.get(f"param.{name}.linear.weight"), tensors.get(f"param.{name}.linear.bias")
    if weight is None:
        return None
    norm = [tensors.get(f"param.{name}.norm.{part}") for part in ("weight", "bias")]

    def apply(z: Tensor) -> Tensor:
        heads, dim = z.shape[1], z.shape[-1]
        joint = weight.shape[1] == heads * dim and heads > 1
        if joint:
            z = z.transpose(1, 2).flatten(-2)
        z = F.linear(z, weight, bias)
        if norm[0] is not None:
            z = F.layer_norm(z, z.shape[-1:], *norm)
        return z.unflatten(-1, (heads, dim)).transpose(1, 2) if joint else z

    return apply


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "favor_noncausal": favor_attention,
    "favor_causal": favor_attention,
    "ra": randomized_attention,
    "lara_1d": lara_attention,
    "lara_2d": lara_attention,
    "eva_1d": eva_attention,
    "eva_2d": eva_attention,
    "causal_eva": eva_attention,
}
ARGUMENTS: dict[str, Callable[[Mapping[str, Any], Tensors, str], dict[str, Any]]] = {
    "favor_noncausal": _favor,
    "favor_causal": _favor,
    "ra": _ra,
    "lara_1d": _lara,
    "lara_2d": _lara,
    "eva_1d": _eva,
    "eva_2d": _eva,
    "causal_eva": _causal_eva,
}
