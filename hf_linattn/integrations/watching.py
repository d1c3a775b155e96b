"""Where Transformers is given a name with the model at hand: methods of all models, for want of a hook."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

from .seams import MAKERS, PreTrainedModel


def watch_models(
    built: Callable[[Any], None], switch: Callable[..., Any], failed: Callable[[type, KeyError], None]
) -> None:
    """Have `built` called with every new model, and `switch` in place of `set_attn_implementation`. Repeatable.

    Args:
        built: From a model whose modules are complete, once; not called for the parts of one that is being built.
        switch: From the method it replaces and its arguments.
        failed: From the class of a model and the `KeyError` that making it ended in, which is raised afterwards.
    """
    post_init, set_attention = PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation
    if hasattr(post_init, _WATCHED):
        return
    complete: weakref.WeakSet[Any] = weakref.WeakSet()

    @functools.wraps(post_init)
    def checked_post_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        complete.add(self)
        if not _is_part(self):
            built(self)
        return post_init(self, *args, **kwargs)

    @functools.wraps(set_attention)
    def checked_set_attention(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        return switch(set_attention, self, attn_implementation, *args, **kwargs)

    def watched(method: Any) -> Any:
        @functools.wraps(method.__func__)
        def make(cls: type, *args: Any, **kwargs: Any) -> Any:
            try:
                made = method.__func__(cls, *args, **kwargs)
            except KeyError as error:
                failed(cls, error)
                raise
            model = made[0] if isinstance(made, tuple) else made
            # Some constructors do not call post_init.
            if isinstance(model, PreTrainedModel) and model not in complete and not _is_part(model):
                built(model)
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
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(f"{__package__}.canary"):
            return False  # a model that is tried out while another one is made
        if frame.f_code.co_name == "__init__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, PreTrainedModel) and owner is not model:
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
