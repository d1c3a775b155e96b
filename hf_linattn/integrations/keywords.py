"""The keyword arguments of an attention function: which a caller's batch brought, and which would change the result.

A model hands the keyword arguments of its call down to the attention function, where they arrive together with those
that the attention module gives by itself. Stock attention ignores what it does not know, and batches are full of such
names: `length`, `special_tokens_mask`, `return_loss`. From the caller they are ignored here too. What the model's own
code gives, or what an attention function of Transformers reads, means something: it is known, or it raises.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from .expected import installed
from .seams import attention_keywords

BORDERS, LONGEST = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
# Arguments of padding-free collators beside positions, which say where packed sequences start.
PACKING = frozenset({*BORDERS, *LONGEST, "seq_idx"})

# What models pass on to the attention function and what does not change what attention computes.
HARMLESS = frozenset(
    {
        "cache_position",
        "encoder_hidden_states",  # cross-attention, decided elsewhere
        "grid",  # ours: patches per column and row
        "is_causal",  # decided elsewhere
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",  # checked separately
        "return_dict",
        "use_cache",
    }
)

# What does change it, with what to do about each.
REFUSED = {
    "output_attentions": (
        "Attention weights do not exist in a linear attention kind, so output_attentions=True has no answer. Call "
        "model.set_attn_implementation('eager') first to get those of softmax attention."
    ),
    "softcap": (
        "A soft cap on attention logits cannot be applied by a linear attention kind. Use attn_implementation='eager'."
    ),
    "sliding_window": (
        "A linear attention kind attends to the whole sequence. Load the model with sliding_window=None, or use "
        "attn_implementation='sdpa'."
    ),
    "s_aux": "Attention sinks are not supported by a linear attention kind. Use attn_implementation='eager'.",
    "sinks": "Attention sinks are not supported by a linear attention kind. Use attn_implementation='eager'.",
    "position_bias": (
        "A bias on attention logits (relative positions, ALiBi) cannot be applied by a linear attention kind. Use "
        "attn_implementation='eager' for this model."
    ),
    "head_mask": "A mask over heads is not supported by a linear attention kind. Use attn_implementation='eager'.",
    "cache": "A paged cache (continuous batching) is not supported. Use model.generate() with its default cache.",
}


def check_keywords(kind: str, module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Raise `InputError` or `UnsupportedError` for an argument that changes the result in a way no kind can follow.

    Returns: whether some say where packed sequences start.
    """
    says_packing = False
    for name, value in kwargs.items():
        if value is None or value is False or name in HARMLESS:
            continue
        if name in PACKING:
            says_packing = True
            continue
        if name in REFUSED:
            error = InputError if name == "output_attentions" else UnsupportedError
            raise error(f"{REFUSED[name]} Got {name}={_short(value)} under {kind!r}.")
        if means_something(type(module), name):
            raise UnsupportedError(
                f"The attention function of {kind!r} was given {name}={_short(value)} by {type(module).__name__}, or "
                "as an argument that attention in Transformers reads. It does not know it, and ignoring it could give "
                f"a wrong result. If it comes from your call, drop it; if the model passes it, or {installed()}, use "
                "attn_implementation='sdpa' for this model."
            )
    return says_packing


@torch.compiler.assume_constant_result
def means_something(module_class: type, name: str) -> bool:
    """Whether a name is more than a key of the caller's batch that happened to come along.

    It is, if an attention function of Transformers takes it, or if the code of the model gives it to something that
    also hands on the caller's keyword arguments. Without source code to read, every name is.
    """
    own = given_by_the_model(module_class)
    return own is None or name in own or name in attention_keywords()


@functools.lru_cache(maxsize=256)
def given_by_the_model(module_class: type) -> frozenset[str] | None:
    """Names that the source of a class of attention modules gives by itself; `None` if it cannot be read."""
    names: set[str] = set()
    for cls in module_class.__mro__:
        if cls is object or cls.__module__.partition(".")[0] == "torch":
            continue
        try:
            tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
        except (OSError, TypeError, KeyError, SyntaxError):
            tree = ast.Module([], [])
        own = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls.__name__]
        if own:
            names.update(_given(tree, own))
        elif "forward" in vars(cls):
            return None
        # Otherwise a class made on the way (FSDP, parametrize), which calls no attention function.
    return frozenset(names)


def _given(tree: ast.Module, own: list[ast.ClassDef]) -> Iterator[str]:
    """Keyword arguments in calls by the class that hand on the module itself, as that of the attention function does,
    and in calls anywhere that hand on further ones (`**kwargs`).
    """
    within = {node for cls in own for node in ast.walk(cls)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.endswith("attention_forward"):
            yield from (argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
        if not isinstance(node, ast.Call) or "loss" in ast.unparse(node.func):
            continue
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        hands_on_itself = node in within and any(isinstance(v, ast.Name) and v.id == "self" for v in values)
        if hands_on_itself or any(keyword.arg is None for keyword in node.keywords):
            yield from (keyword.arg for keyword in node.keywords if keyword.arg is not None)


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]
