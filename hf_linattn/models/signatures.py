"""Methods of converted classes that look like those of the stock ones: Trainer and `generate` read signatures."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def init_of(cls: Any, stock: Any) -> Any:
    """`__init__` of a converted class, with the signature of the stock one."""

    @functools.wraps(stock.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        super(cls, self).__init__(*args, **kwargs)

    return init


def forward_of(stock: Any) -> Any:
    """`forward` of a converted class: the stock one after `check_call`, with its signature.

    Not in `__call__`, because libraries call `forward` directly.
    """
    stock_forward = stock.forward

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.check_call(args, kwargs)
        if self.sequence_parallel is None:
            return stock_forward(self, *args, **kwargs)
        return self.sequence_parallel(self, functools.partial(stock_forward, self), args, kwargs)

    return forward


def signed_like(stock: Any, *own: str) -> Any:
    """Give a method the signature of the stock one, and keyword arguments of its own."""

    def sign(method: Any) -> Any:
        parameters = list(inspect.signature(stock).parameters.values())
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in own]
        end = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        method.__signature__ = inspect.Signature([*parameters[:end], *more, *parameters[end:]])
        return method

    return sign
