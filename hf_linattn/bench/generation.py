"""Generation token by token: time per token and size of the cache, behind contexts of several lengths."""

from __future__ import annotations

import copy
import gc
import statistics
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, PreTrainedModel

from ..conversion import extend_positions
from ..errors import ConfigError
from ..integrations.families import get_family
from ..integrations.seams import cache_argument
from ..modules.config import AttentionConfig
from ..modules.defaults import resolve
from ..modules.registry import get_kind
from .models import converted, quiet
from .plan import Plan, Report
from .results import Row, with_ratios
from .timing import explain
from .workload import DTYPES, Workload

CONTEXTS = (1024, 4096, 16384, 65536)
LAYERS = 4
VOCABULARY = 4096  # so that the head's share of a small model is about what it is in GPT-2
WINDOWS = 2  # a timed run of steps is so many windows: what is done once per window is in it as often as it should be
SOFTMAX_STEPS = 16  # of a timed run of softmax, every step of which does the same
MIN_ROUNDS, MAX_ROUNDS = 3, 20


@dataclass
class _Case:
    """One attention behind one context. `cache` is filled with it; every round works on a copy."""

    row: Row
    model: PreTrainedModel
    steps: int
    cache: Any = None
    means: list[float] = field(default_factory=list)  # seconds per step of each round


def run_generation(plan: Plan, report: Report = lambda _: None) -> Iterator[list[Row]]:
    """Time single-token steps of a GPT-2 behind contexts of all lengths. Yields the rows of one length at a time.

    A round goes through all kinds and lengths, every other round backwards, so that whatever else the machine does
    meets all of them. A timed run is two windows of steps (of softmax, which has none, at most 16 steps) on a copy of
    the filled cache; its mean is the round's sample, and a row has the median of the samples.

    Raises: `ConfigError` if `plan.checkpoint` is not a GPT-2.
    """
    for dtype in plan.dtypes:
        with quiet(), torch.inference_mode():
            torch.manual_seed(0)
            cases, ids = _cases(plan, dtype, report)
            _time_in_turns(cases, ids, plan.seconds, report)
        rows = [_finished(case) for case in cases]
        for tokens in sorted(set(plan.lengths)):
            yield with_ratios([row for row in rows if row.work.tokens == tokens])


def _finished(case: _Case) -> Row:
    if case.row.reason or not case.means:
        return case.row
    mean = statistics.median(case.means)
    return replace(case.row, mean=mean, minimum=min(case.means), samples=len(case.means))


# -- models -----------------------------------------------------------------------------------------------------------
def _cases(plan: Plan, dtype: str, report: Report) -> tuple[list[_Case], Tensor]:
    """Every attention behind every context, with filled caches or the reason why not; and the tokens they read."""
    configs = _configs(plan)
    steps = WINDOWS * max((resolve(config, "gpt2").window_size or 1 for config in configs.values()), default=1)
    model = _model(plan, dtype, max(plan.lengths) + steps)
    sizes = model.config
    heads, width = sizes.n_head, sizes.n_embd
    title = Path(plan.checkpoint or f"gpt2 ({sizes.n_layer} layers)").name
    ids = torch.randint(sizes.vocab_size, (plan.batch, max(plan.lengths) + steps)).to(plan.device)
    cases = []
    for name, config in {"sdpa": None, **configs}.items():
        made, reason = model, ""
        if config is not None:
            try:
                made = converted(model, config, ids).eval()
            except Exception as error:
                reason = explain(error)
        for tokens in sorted(set(plan.lengths)):
            report(f"{name}, {dtype}: reading {tokens} tokens")
            work = Workload(tokens, plan.batch, heads, width // heads, True, dtype, device=plan.device)
            group, settings = ("linear", config.to_dict()) if config else ("softmax", None)
            row = Row("generation", name, group, work, title, reason=reason, settings=settings)
            cases.append(_Case(row, made, steps if config else min(steps, SOFTMAX_STEPS)))
            if not reason:
                _fill(cases[-1], ids, steps // WINDOWS, plan)
    return cases, ids


def _configs(plan: Plan) -> dict[str, AttentionConfig]:
    """Settings of every row that is not softmax, by its name."""
    found: dict[str, AttentionConfig] = {}
    for contender in plan.kind_contenders():
        config = contender.config
        assert config is not None
        found[contender.name] = config
        kind = get_kind(config.kind)
        if plan.max_chunks and kind.bound_field:
            name = f"{contender.name}, at most {plan.max_chunks} {kind.size_word}"
            found[name] = config.replace(**{kind.bound_field: plan.max_chunks})
    return found


def _model(plan: Plan, dtype: str, positions: int) -> PreTrainedModel:
    """A stock GPT-2 with at least so many positions."""
    if plan.checkpoint is None:
        sizes = {"n_embd": plan.heads * plan.head_dim, "n_head": plan.heads, "n_layer": plan.layers or LAYERS}
        config = GPT2Config(**sizes, n_positions=positions, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    else:
        model = AutoModelForCausalLM.from_pretrained(plan.checkpoint, attn_implementation="sdpa")
        found = model.config.model_type
        if found != "gpt2" or get_family(model.config).name != "gpt2":
            raise ConfigError(f"The checkpoint must be a stock GPT-2; got model_type {found!r} in {plan.checkpoint}.")
        if model.config.n_positions < positions:
            extend_positions(model, positions)
    return model.to(plan.device, DTYPES[dtype]).eval()


# -- caches -----------------------------------------------------------------------------------------------------------
def fill(model: PreTrainedModel, ids: Tensor, piece: int) -> Any:
    """A cache that has read `ids` `[batch, tokens]`, `piece` tokens at a time."""
    cache = DynamicCache(config=model.config)
    given = {cache_argument(model): cache}
    for part in ids.split(piece, dim=1):
        model(input_ids=part, use_cache=True, logits_to_keep=1, **given)
    return cache


def fill_at_random(model: PreTrainedModel, ids: Tensor) -> Any:
    """A cache of random keys and values for as many tokens as `ids` has.

    For softmax attention, whose cost does not depend on what they are, while reading 65536 tokens takes it minutes.
    """
    cache, config = DynamicCache(config=model.config), model.config
    size = (ids.shape[0], config.n_head, ids.shape[1], config.n_embd // config.n_head)
    for layer in range(config.n_layer):
        key, value = (torch.randn(size, device=ids.device, dtype=model.dtype) for _ in range(2))
        cache.update(key, value, layer)
    return cache


def held_bytes(*things: Any, model: nn.Module | None = None) -> int:
    """Bytes of all tensors that can be reached from the things given; memory that several of them share counts once.

    Modules and functions are not entered. What `model` holds itself does not count.
    """
    own = () if model is None else (*model.parameters(), *model.buffers())
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages: dict[int, int] = {}
    seen: dict[int, Any] = {}  # keeps what it has seen, so that no id is used twice
    waiting = list(things)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (nn.Module, type, types.ModuleType, types.FunctionType)):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        else:
            waiting += gc.get_referents(thing)
    return sum(size for place, size in storages.items() if place not in known)


def _fill(case: _Case, ids: Tensor, steps: int, plan: Plan) -> None:
    """Fill the case's cache and note its largest size within `steps` steps, or why it cannot run."""
    tokens, group = case.row.work.tokens, case.row.group
    try:
        plan.check_length(group, case.row.work)
        read = ids[:, :tokens]
        case.cache = fill_at_random(case.model, read) if group == "softmax" else fill(case.model, read, plan.piece)
        cache, most = copy.deepcopy(case.cache), 0
        step = _stepper(case.model, cache, ids, tokens)
        for _ in range(steps):
            step()
            most = max(most, held_bytes(*cache.layers, model=case.model))
        case.row = replace(case.row, state=most // len(cache.layers))
    except Exception as error:
        case.row, case.cache = replace(case.row, reason=explain(error)), None


# -- time -------------------------------------------------------------------------------------------------------------
def _stepper(model: PreTrainedModel, cache: Any, ids: Tensor, position: int) -> Callable[[], None]:
    """What reads one more token at every call."""
    given, rest = {cache_argument(model): cache}, iter(ids[:, position:].split(1, dim=1))

    def step() -> None:
        model(input_ids=next(rest), use_cache=True, **given)
        if ids.is_cuda:
            torch.cuda.synchronize()  # as it is where the next token depends on this one's logits

    return step


def _mean_seconds(case: _Case, ids: Tensor) -> float:
    """Of the steps of one run, on a copy of the cache; a few steps on another copy come before."""
    start = lambda: _stepper(case.model, copy.deepcopy(case.cache), ids, case.row.work.tokens)  # noqa: E731
    timer = Timer("step()", setup="step = start()", globals={"start": start}, num_threads=torch.get_num_threads())
    return timer.timeit(case.steps).mean


def _time_in_turns(cases: list[_Case], ids: Tensor, seconds: float, report: Report) -> None:
    """Time all cases, round by round. One that is slow takes part in fewer rounds."""
    for number in range(MAX_ROUNDS):
        for case in cases[:: -1 if number % 2 else 1]:
            row, steps = case.row, case.steps
            wanted = max(MIN_ROUNDS, seconds / (case.means[0] * steps)) if case.means else MIN_ROUNDS
            if row.reason or number >= wanted:
                continue
            report(f"{row.name}, {row.work.dtype}: round {number + 1}, {row.work.tokens} tokens")
            try:
                case.means.append(_mean_seconds(case, ids))
            except Exception as error:
                case.row = replace(row, reason=explain(error))
