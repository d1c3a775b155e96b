"""A kind's name given to a model: refused at once where some part would take it and compute softmax all the same.

Transformers takes a registered name for every model class. Whether a model asks for the function behind the name shows
only in its modules, so these are looked at, once: when a model whose config has a kind's name has been built
(`from_pretrained`, `from_config`, a constructor), and after `set_attn_implementation`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from ..modules.registry import list_kinds
from .advice import CROSS, has_cross_attention, kinds_for
from .canary import check_seams
from .families import is_converted
from .model_seams import MAKERS
from .patterns import in_config
from .seams import PreTrainedModel, attention_of, callers, parts_of_config, select_attention, softmax_name_of
from .users import Part, parts_of


def check_built(model: Any) -> None:
    """Raise `UnsupportedError` if a part of a new model would ignore the kind that its config names.

    And `CheckpointError` if the config is that of a converted model, and the class is not: it would be softmax.
    """
    kinds = list_kinds()
    for config in parts_of_config(model.config):
        settings = getattr(config, "linear_attention", None)
        if isinstance(settings, dict) and "layers" in settings and not is_converted(type(config)):
            raise CheckpointError(
                f"The config of {type(model).__name__} is that of a converted model ({settings.get('kind')!r}), and"
                " this class would compute softmax attention with its weights. Load it with an Auto class or a LinAttn"
                f" class, with model_type 'linattn_{type(config).model_type}' in config.json. For softmax,"
                " revert it then (hf_linattn.revert)."
            )
    named = {name for part in parts_of_config(model.config) if (name := attention_of(part)) in kinds}
    if named:
        parts, kind = parts_of(model), sorted(named)[0]
        told = [part for part in parts if attention_of(part.config) in kinds]
        if not told and _hindrance(parts) is None:
            raise UnsupportedError(
                f"Transformers does not hand a name on to the parts of {type(model).__name__} that attend"
                f" ({', '.join(dict.fromkeys(part.owner for part in parts))}), so attn_implementation={kind!r} would"
                f" change nothing. Make the model without it, then call model.set_attn_implementation({kind!r})."
            )
        _check(model, kind, told)


def _explain(cls: Any, error: KeyError) -> None:
    """Raise `UnsupportedError` for a model that looks a kind's name up in a table of its own."""
    kind = error.args[0] if error.args else None
    if kind in list_kinds():
        raise UnsupportedError(
            f"{cls.__name__} chooses among its own attention classes by name, and has none for {kind!r}: no linear"
            f" attention kind can replace its attention. Use attn_implementation={softmax_name_of(cls)!r}."
        ) from error


def set_and_check(switch: Any, model: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `set_attn_implementation`, and take everything back if a part that was named would ignore the kind."""
    asked = sorted(set(list_kinds()) & set(_names_in(name)))
    if not asked:
        return switch(model, name, *args, **kwargs)
    parts = parts_of(model)
    configs = [*parts_of_config(model.config), *(part.config for part in parts)]
    before = [(config, attention_of(config)) for config in configs]
    try:
        result = switch(model, name, *args, **kwargs)
        # A name for the whole model is one for every part, those that Transformers leaves as they are included.
        told = parts if isinstance(name, str) else [part for part in parts if attention_of(part.config) in asked]
        _check(model, asked[0], told)
        kept = next((part for part in told if part.asking and attention_of(part.config) not in asked), None)
        if kept is not None:
            raise UnsupportedError(
                f"Transformers does not let the attention of {kept.owner} be changed in a model that exists, and has"
                f" kept {attention_of(kept.config)!r}. Load the model with attn_implementation={asked[0]!r} instead."
            )
    except BaseException:
        for config, implementation in before:
            select_attention(config, implementation, parts=False)
        raise
    return result


def natively(model: Any, kind: str | None) -> str:
    """What can be had without conversion in a model, as a sentence; `kind`: the one that was asked for."""
    parts = parts_of(model)
    instead = f"use attn_implementation={softmax_name_of(*model.modules())!r}"
    why = _hindrance(parts)
    if why is not None:
        return f"No linear attention kind works in it without conversion either: {why}; {instead}."
    causal = any(getattr(module, "is_causal", False) for part in parts for module in part.asking)
    cross = has_cross_attention(model.config)
    able = kinds_for(is_causal=causal or cross, cross=cross)
    name = kind if kind in able else able[0]
    others = "" if kind in able else f"{kind!r} does not work in it without conversion, but one of {able} does: "
    settings = f" with linear_attention = {CROSS} in its config" if cross else ""
    settings += " (a call raises where it cannot be right)"
    if kind in able and kind not in (safe := kinds_for(is_causal=True)):  # a model may say so only when it is called
        settings = f", if none of its layers is causal; otherwise with one of {safe}"
    return f"{others or 'Without conversion: '}model.set_attn_implementation({name!r}){settings}."


def _hindrance(parts: list[Part]) -> str | None:
    """Why no kind can work in a model, as far as its modules and config tell."""
    if not any(part.asking for part in parts):
        return "it has no attention layer that asks Transformers' AttentionInterface for its function"
    for part in parts:
        pattern = in_config(part.config)
        if part.alone and not _asks_within(part, parts):
            return f"{part.owner} computes softmax attention itself ({type(part.alone[0]).__name__})"
        if part.asking and pattern is not None:
            return f"its layers of type {type(part.asking[0]).__name__} use {pattern}"
        if getattr(part.config, "attn_logit_softcapping", None):
            return "attention logits are capped (config.attn_logit_softcapping)"
        for module in part.asking:
            for name, what in _EXTRAS.items():
                if getattr(module, name, None) is not None and getattr(module, name) is not False:
                    return f"{type(module).__name__} has {what}"
    return None


# Attributes of attention modules for something that no kind can follow.
_EXTRAS = {
    "has_relative_attention_bias": "a bias of relative positions",
    "relative_attention_bias": "a bias of relative positions",
    "relative_position_bias": "a bias of relative positions",
    "relative_position_bias_table": "a bias of relative positions",
    "sinks": "attention sinks",
}


def _names_in(name: Any) -> Iterable[str]:
    if isinstance(name, str):
        yield name
    elif isinstance(name, Mapping):
        for value in name.values():
            yield from _names_in(value)


def _check(model: Any, kind: str, told: list[Part]) -> None:
    """Raise if one of the parts that were told to use a kind does not ask for its function."""
    ignoring = next((part for part in told if part.alone and not _asks_within(part, told)), None)
    if ignoring is None and any(part.asking for part in told):
        return
    check_seams()  # a release in which models ask in another way is told as such
    instead = softmax_name_of(*model.modules())
    if ignoring is None:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention layer that asks Transformers' AttentionInterface for its"
            f" function, so attn_implementation={kind!r} would change nothing. Load it without attn_implementation, or"
            f" with {instead!r}."
        )
    own = type(ignoring.alone[0]).__name__
    able = _able(model, kind, told)
    advice = (
        f"Use attn_implementation={instead!r} for this model: no linear attention kind can replace its attention."
        if not able
        else f"Name the parts that ask for it alone: attn_implementation={able}."
    )
    raise UnsupportedError(
        f"{ignoring.owner} computes softmax attention itself ({own}) instead of asking Transformers'"
        f" AttentionInterface, so attn_implementation={kind!r} would be ignored there. {advice}"
    )


def _asks_within(part: Part, parts: list[Part]) -> bool:
    """Whether a name in the part's config reaches a module that asks, in it or in a part of it.

    What attends by itself beside such modules (a pooling head, a projector) does so whatever the name.
    """
    inside = {id(config) for config in parts_of_config(part.config)}
    return bool(part.asking) or any(other.asking and id(other.config) in inside for other in parts)


def _able(model: Any, kind: str, told: list[Part]) -> dict[str, str]:
    """What to pass so that only parts that ask for the function are named; empty if there is no such part."""
    able, config = {}, model.config
    for key in type(config).sub_configs:
        inside = {id(part) for part in parts_of_config(getattr(config, key, None))}
        parts = [part for part in told if id(part.config) in inside]
        if any(part.asking for part in parts) and all(part.asking for part in parts):
            able[key] = kind
    return able


# -- where Transformers is given a name with the model at hand: methods of all models, for want of a hook -----------
def watch_names() -> None:
    """Look at every new model when its modules are complete, and before `set_attn_implementation`. Repeatable."""
    post_init, set_attention = PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation
    if hasattr(post_init, _WATCHED):
        return
    complete: weakref.WeakSet[Any] = weakref.WeakSet()

    @functools.wraps(post_init)
    def checked_post_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        complete.add(self)
        if not _is_part(self):
            check_built(self)
        return post_init(self, *args, **kwargs)

    @functools.wraps(set_attention)
    def checked_set_attention(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        return set_and_check(set_attention, self, attn_implementation, *args, **kwargs)

    def watched(method: Any) -> Any:
        @functools.wraps(method.__func__)
        def make(cls: type, *args: Any, **kwargs: Any) -> Any:
            try:
                made = method.__func__(cls, *args, **kwargs)
            except KeyError as error:
                _explain(cls, error)
                raise
            model = made[0] if isinstance(made, tuple) else made
            # Some constructors do not call post_init.
            if isinstance(model, PreTrainedModel) and model not in complete and not _is_part(model):
                check_built(model)
            return made

        return classmethod(make)

    for name in MAKERS:
        setattr(PreTrainedModel, name, watched(getattr(PreTrainedModel, name)))
    setattr(checked_post_init, _WATCHED, True)
    PreTrainedModel.post_init = checked_post_init
    PreTrainedModel.set_attn_implementation = checked_set_attention


_WATCHED = "_watched_by_hf_linattn"


def _is_part(model: Any) -> bool:
    """Whether a model is made by the constructor of another one, which will be looked at as a whole."""
    for frame in callers():
        if frame.f_globals.get("__name__", "").startswith(f"{__package__}.canary"):
            return False  # a model that is tried out while another one is made
        if frame.f_code.co_name == "__init__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, PreTrainedModel) and owner is not model:
                return True
    return False
