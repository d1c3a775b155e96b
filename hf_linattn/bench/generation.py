"""Generation token by token: time per token and size of the cache, behind contexts of several lengths."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, PreTrainedModel

from ..conversion import calibrate, convert, extend_positions, needs_calibration
from ..errors import ConfigError
from ..integrations.families import get_family
from ..integrations.seams import cache_argument
from ..modules.config import AttentionConfig
from ..modules.defaults import resolve
from .attention import Plan, Report
from .cases import DTYPES, Workload
from .measure import explain
from .models import CALIBRATION_TOKENS, _quiet, _sharing_copy
from .results import Row, with_ratios

LENGTHS = (1024, 4096, 16384, 65536)
VOCABULARY = 4096  # so that the head's share of a small model is about what it is in GPT-2
WINDOWS = 2  # a timed run of steps is so many windows: what is done once per window is in it as often as it should be
SOFTMAX_STEPS = 16  # of a timed run of softmax, every step of which does the same
MIN_ROUNDS, MAX_ROUNDS = 3, 20


@dataclass(frozen=True)
class Decoder:
    """What `run_generation` takes beside a `Plan`.

    Args:
        layers: Of the model with random weights.
        path: A GPT-2 checkpoint to use instead; positions that it does not have are added.
        max_chunks: Also run EVA with at most so many summaries; `None` for not.
        piece: Tokens per call while the cache is filled.
    """

    layers: int = 4
    path: str | None = None
    max_chunks: int | None = 64
    piece: int = 2048

    def __post_init__(self) -> None:
        for name in ("layers", "piece", "max_chunks"):
            value = getattr(self, name)
            if not (name == "max_chunks" and value is None) and value < 1:
                raise ConfigError(f"{name} must be an integer >= 1; got {value!r}.")


@dataclass
class _Case:
    """One attention behind one context.

    Args:
        cache: Filled with the context; every round works on a copy.
        rounds: Mean seconds per step of each round.
        steps: Seconds of every timed step.
    """

    row: Row
    model: PreTrainedModel
    cache: Any = None
    rounds: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def run_generation(
    plan: Plan,
    decoder: Decoder,
    *,
    windows: tuple[int | None, ...] = (None,),
    report: Report = lambda _: None,
) -> Iterator[list[Row]]:
    """Time single-token steps of a GPT-2 behind contexts of all lengths.

    A round goes through all kinds and, within a kind, through all lengths (every other round backwards), so that
    whatever else the machine does meets all of them. A timed run is two windows of steps (of softmax, which has
    none, at most 16 steps) on a copy of the filled cache; its mean is the round's sample, and a row has the median of
    the samples.

    Args:
        plan: Lengths (of the context), kinds, dtypes, batch, heads, head_dim, options, device and seconds.
        windows: Window sizes; `None` is the default of the model family.
    Yields: The rows of one dtype at a time.
    """
    for dtype in plan.dtypes:
        with _quiet(), torch.inference_mode():
            torch.manual_seed(0)
            configs = _configs(plan, decoder, windows)
            steps = WINDOWS * max((_window(config) for config in configs.values()), default=1)
            model = _model(plan, decoder, dtype, max(plan.lengths) + steps)
            sizes = model.config
            name = Path(decoder.path).name if decoder.path else f"gpt2 ({sizes.n_layer} layers)"
            ids = torch.randint(sizes.vocab_size, (plan.batch, max(plan.lengths) + steps)).to(plan.device)
            cases: list[_Case] = []
            for title, config in {"sdpa": None, **configs}.items():
                made, reason = model, ""
                if config is not None:
                    try:
                        made = converted(model, config, ids)
                    except Exception as error:
                        reason = explain(error)
                for tokens in sorted(set(plan.lengths)):
                    report(f"{title}, {dtype}: reading {tokens} tokens")
                    work = Workload(
                        tokens, plan.batch, sizes.n_head, sizes.n_embd // sizes.n_head, True, dtype, device=plan.device
                    )
                    group, settings = ("linear", config.to_dict()) if config else ("softmax", None)
                    row = Row("generation", title, group, work, name, reason=reason, settings=settings)
                    cases.append(_prepared(_Case(row, made), ids, steps, plan, decoder))
            _race([case for case in cases if not case.row.reason], ids, steps, plan.seconds, report)
            rows = [_finished(case) for case in cases]
        for tokens in sorted(set(plan.lengths)):
            yield with_ratios([row for row in rows if row.work.tokens == tokens])


# -- models -----------------------------------------------------------------------------------------------------------
def _configs(plan: Plan, decoder: Decoder, windows: tuple[int | None, ...]) -> dict[str, AttentionConfig]:
    """Settings of every row that is not softmax, by its name."""
    found: dict[str, AttentionConfig] = {}
    for window in windows:
        options = replace(plan.options, window_size=window)
        suffix = "" if window is None else f", window {window}"
        for kind in plan.kinds:
            config = options.config(kind)
            found[f"{kind}{suffix}"] = config
            if kind == "eva" and decoder.max_chunks is not None:
                bounded = config.replace(max_chunks=decoder.max_chunks)
                found[f"{kind}{suffix}, at most {decoder.max_chunks} chunks"] = bounded
    return found


def _window(config: AttentionConfig) -> int:
    """Steps after which what a decoder does repeats itself; 1 without a window."""
    return resolve(config, "gpt2").window_size or 1


def _model(plan: Plan, decoder: Decoder, dtype: str, positions: int) -> PreTrainedModel:
    """A stock GPT-2 with at least so many positions."""
    if decoder.path is None:
        config = GPT2Config(
            n_layer=decoder.layers,
            n_embd=plan.heads * plan.head_dim,
            n_head=plan.heads,
            n_positions=positions,
            vocab_size=VOCABULARY,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    else:
        model = AutoModelForCausalLM.from_pretrained(decoder.path, attn_implementation="sdpa")
        if get_family(model.config).name != "gpt2" or model.config.model_type != "gpt2":
            raise ConfigError(
                f"The checkpoint must be a stock GPT-2; got model_type {model.config.model_type!r} in {decoder.path}."
            )
        if model.config.n_positions < positions:
            extend_positions(model, positions)
    return model.to(plan.device, DTYPES[dtype]).eval()


def converted(model: PreTrainedModel, config: AttentionConfig, ids: Tensor) -> PreTrainedModel:
    """A copy of a model around the same weights, converted and, if it has to be, calibrated on the tokens given."""
    made = convert(_sharing_copy(model), config).to(ids.device)
    if needs_calibration(made):
        calibrate(made, [{"input_ids": ids[:, :CALIBRATION_TOKENS]}])
    return made.eval()


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
    """Bytes of all tensors that can be reached from the things given, memory that several of them share once.

    Reached are attributes, dataclass fields and the members of tuples, lists and dictionaries, but not modules. What
    `model` holds itself does not count.
    """
    own = () if model is None else (*model.parameters(), *model.buffers())
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages: dict[int, int] = {}
    seen: dict[int, Any] = {}  # keeps what it has seen, so that no id is used twice
    waiting = list(things)
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (nn.Module, type, str, bytes)):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, (tuple, list, set, frozenset)):
            waiting += thing
        elif dataclasses.is_dataclass(thing):
            waiting += [getattr(thing, entry.name) for entry in dataclasses.fields(thing)]
        if not isinstance(thing, Tensor):
            waiting += getattr(thing, "__dict__", {}).values()
    return sum(size for place, size in storages.items() if place not in known)


# -- time -------------------------------------------------------------------------------------------------------------
def _prepared(case: _Case, ids: Tensor, steps: int, plan: Plan, decoder: Decoder) -> _Case:
    """The case with its cache filled and the cache's size known, or with the reason why it cannot run."""
    tokens = case.row.work.tokens
    limit = plan.max_softmax_length
    if case.row.group == "softmax" and limit is not None and tokens > limit:
        case.row = replace(case.row, reason=f"longer than the {limit} tokens set for softmax")
    if case.row.reason:
        return case
    try:
        read = ids[:, :tokens]
        is_softmax = case.row.group == "softmax"
        case.cache = fill_at_random(case.model, read) if is_softmax else fill(case.model, read, decoder.piece)
        cache, most = copy.deepcopy(case.cache), 0
        for step in range(steps // WINDOWS):
            _step(case.model, cache, ids, tokens + step)
            most = max(most, held_bytes(*cache.layers, model=case.model))
        case.row = replace(case.row, state=most // len(cache.layers))
    except Exception as error:
        case.row, case.cache = replace(case.row, reason=explain(error)), None
    return case


_argument_of = functools.cache(cache_argument)  # not looked up anew in every step that is timed


def _step(model: PreTrainedModel, cache: Any, ids: Tensor, position: int) -> None:
    given = {_argument_of(type(model)): cache}  # type: ignore[arg-type]
    model(input_ids=ids[:, position : position + 1], use_cache=True, **given)
    if ids.is_cuda:
        torch.cuda.synchronize()  # as it is where the next token depends on this one's logits


def _race(cases: list[_Case], ids: Tensor, steps: int, seconds: float, report: Report) -> None:
    """Time all cases in turns, and write the times into them. A row that is slow takes part in fewer rounds."""
    rows: dict[str, list[_Case]] = {}
    for case in cases:
        rows.setdefault(case.row.name, []).append(case)
    rounds = {name: MIN_ROUNDS for name in rows}
    for number in range(MAX_ROUNDS):
        for name in [name for name in rows if number < rounds[name]]:
            start = time.perf_counter()
            for case in rows[name][:: -1 if number % 2 else 1]:
                if case.row.reason:
                    continue
                report(f"{name}, {case.row.work.dtype}: round {number + 1}, {case.row.work.tokens} tokens")
                try:
                    taken = _timed(case, ids, steps)
                except Exception as error:
                    case.row = replace(case.row, reason=explain(error))
                    continue
                case.rounds.append(statistics.fmean(taken))
                case.steps += taken
            if number == 0:
                took = max(time.perf_counter() - start, 1e-9)
                rounds[name] = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds * len(rows[name]) / took)))


def _timed(case: _Case, ids: Tensor, steps: int) -> list[float]:
    """Seconds of each step on a copy of the cache, after two that do not count."""
    tokens, taken = case.row.work.tokens, []
    warm_up = copy.deepcopy(case.cache)
    for step in range(2):
        _step(case.model, warm_up, ids, tokens + step)
    del warm_up
    cache = copy.deepcopy(case.cache)
    for step in range(min(steps, SOFTMAX_STEPS) if case.row.group == "softmax" else steps):
        start = time.perf_counter()
        _step(case.model, cache, ids, tokens + step)
        taken.append(time.perf_counter() - start)
    return taken


def _finished(case: _Case) -> Row:
    if case.row.reason or not case.rounds:
        return case.row
    return replace(
        case.row,
        mean=statistics.median(case.rounds),
        median=statistics.median(case.steps),
        minimum=min(case.rounds),
        samples=len(case.rounds),
    )
