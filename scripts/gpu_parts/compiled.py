"""`torch.compile(mode="reduce-overhead")`: CUDA graphs of models, of training steps and of decoding steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config

import hf_linattn
from hf_linattn.bench.timing import Failure, explain, time_in_turns
from hf_linattn.modules.registry import config_from_dict
from isolated import Finding

from .context import Context

LAYERS = 2
# The same answer within the roundings of bfloat16 through a few layers.
LIMIT = 3e-2
SETTINGS: dict[str, dict[str, Any]] = {
    "favor_plus": {"num_features": 64, "window_size": 32},
    "eva": {"num_chunks": 64, "window_size": 32},
    "lara": {"num_landmarks": 64, "window_size": 32},
    "favor_sharp": {"num_features": 64, "window_size": 32},
}


def _options(context: Context) -> dict[str, Any]:
    # Inductor needs a C++ compiler on a CPU and has no CUDA graphs there: a rehearsal traces and compiles nothing.
    return {"backend": "aot_eager"} if context.is_rehearsal else {"mode": "reduce-overhead"}


def _model(context: Context, kind: str | None, auto: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="sdpa")
    if kind is not None:
        model = hf_linattn.convert(model, config_from_dict({"kind": kind, **SETTINGS[kind]}))
    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    return model.to(context.device, dtype).eval()


def compiled(context: Context) -> Iterator[Finding]:
    """BERT forward, every kind and softmax; a training step; decoding with a static cache."""
    torch.set_float32_matmul_precision("high")
    hidden, tokens, batch = (32, 64, 1) if context.is_rehearsal else (768, 512, 8)
    config = BertConfig(
        hidden_size=hidden,
        num_attention_heads=hidden // 64 or 2,
        intermediate_size=4 * hidden,
        num_hidden_layers=LAYERS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(context.device)

    def cases(*kinds: str | None) -> Iterator[tuple[str, str | None]]:
        return ((kind or "sdpa", kind) for kind in kinds)

    for name, kind in cases(None, "favor_plus", "eva"):
        yield _guarded({"compiled": "forward", "attention": name}, partial(_forward, context, kind, config, ids))
    for name, kind in cases("favor_plus", None):
        yield _guarded({"compiled": "decoding", "attention": name}, partial(_decode, context, kind))
    for name, kind in cases("favor_plus", "eva", None):
        yield _guarded({"compiled": "training", "attention": name}, partial(_train, context, kind, config, ids))
    for name, kind in cases("lara", "favor_sharp"):
        yield _guarded({"compiled": "forward", "attention": name}, partial(_forward, context, kind, config, ids))
    yield _guarded({"compiled": "decoding", "attention": "eva"}, partial(_decode, context, "eva"))


def _guarded(finding: Finding, measure: Callable[[], Finding]) -> Finding:
    start = time.perf_counter()
    try:
        finding |= measure()
    except Exception as error:
        finding |= {"failed": True, "reason": explain(error)}
    return finding | {"seconds": round(time.perf_counter() - start, 1)}


def _forward(context: Context, kind: str | None, config: Any, ids: Tensor) -> Finding:
    model = _model(context, kind, AutoModel, config)
    compiled_model = torch.compile(model, **_options(context))

    def call(module: nn.Module) -> Tensor:
        with torch.no_grad():
            if not context.is_rehearsal:
                torch.compiler.cudagraph_mark_step_begin()
            return module(input_ids=ids).last_hidden_state

    expected = call(model)
    for _ in range(3):  # warm up, record, replay
        found = call(compiled_model)
    off = float((found.float() - expected.float()).norm() / expected.float().norm())
    times = _times(context, {"eager": lambda: call(model), "compiled": lambda: call(compiled_model)})
    return {"difference": off, "failed": not off <= LIMIT, **times}


def _train(context: Context, kind: str | None, config: Any, ids: Tensor) -> Finding:
    model = _model(context, kind, AutoModel, config).train()
    compiled_model = torch.compile(model, **_options(context))

    def step(module: nn.Module) -> Tensor:
        model.zero_grad(set_to_none=True)
        if not context.is_rehearsal:
            torch.compiler.cudagraph_mark_step_begin()
        module(input_ids=ids).last_hidden_state.float().square().mean().backward()
        return model.embeddings.word_embeddings.weight.grad

    expected = step(model).clone()
    for _ in range(3):
        found = step(compiled_model).clone()
    off = float((found.float() - expected.float()).norm() / expected.float().norm())
    times = _times(context, {"eager": lambda: step(model), "compiled": lambda: step(compiled_model)})
    return {"difference": off, "failed": not off <= 2 * LIMIT, **times}


def _decode(context: Context, kind: str | None) -> Finding:
    """`generate` with a static cache, which Transformers compiles by itself on a GPU."""
    hidden = 32 if context.is_rehearsal else 768
    config = GPT2Config(
        n_layer=LAYERS, n_embd=hidden, n_head=hidden // 64 or 2, bos_token_id=0, eos_token_id=None, pad_token_id=0
    )
    model = _model(context, kind, AutoModelForCausalLM, config)
    new = 8 if context.is_rehearsal else 64
    ids = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0)).to(context.device)
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    dynamic = model.generate(ids, **options)
    static: Tensor | None = None
    for _ in range(2):
        static = model.generate(ids, cache_implementation="static", **options)
    assert static is not None
    same = float((dynamic == static)[:, ids.shape[1] :].float().mean())
    times = _times(
        context,
        {
            "eager": lambda: model.generate(ids, **options),
            "compiled": lambda: model.generate(ids, cache_implementation="static", **options),
        },
    )
    return {"same_tokens": same, "new_tokens": new, **times}


def _times(context: Context, calls: dict[str, Callable[[], object]]) -> Finding:
    found = time_in_turns(calls, seconds=1e-3 if context.is_rehearsal else 0.3)
    result: Finding = {}
    for name, timing in found.items():
        if isinstance(timing, Failure):
            result |= {"failed": True, "reason": timing.reason}
        else:
            result[f"{name}_seconds"] = timing.median
    return result
