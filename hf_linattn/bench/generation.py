"""Generation token by token: time per token and size of the cache, behind contexts of several lengths."""

from __future__ import annotations

import copy
import gc
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement, Timer
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, PreTrainedModel

from ..conversion import extend_positions
from ..errors import ConfigError
from ..integrations.families import get_family
from ..integrations.seams import cache_argument
from ..modules.config import AttentionConfig
from ..modules.defaults import resolve
from ..modules.registry import get_kind
from .models import converted, quiet
from .plan import Plan, Report, new_row, race
from .results import Row
from .workload import DTYPES, Contender, Workload, check_length

CONTEXTS = (1024, 4096, 16384, 65536)
LAYERS = 4
VOCABULARY = 4096  # so that the head's share of a small model is about what it is in GPT-2
WINDOWS = 2  # a timed run of steps is so many windows: what is done once per window is in it as often as it should be
SOFTMAX_STEPS = 16  # of a timed run of softmax, every step of which does the same


def run_generation(plan: Plan, report: Report = lambda _: None) -> Iterator[list[Row]]:
    """Time single-token steps of a GPT-2 behind contexts of all lengths. Yields the rows of one length at a time.

    A timed run is two windows of steps (of softmax, which has none, at most 16 steps) on a copy of the filled cache;
    its mean is a sample, and a row has the median of the samples.

    Raises: `ConfigError` if `plan.checkpoint` is not a GPT-2.
    """
    contenders = _contenders(plan)
    configs = [contender.config for contender in contenders if contender.config]
    steps = WINDOWS * max((resolve(config, "gpt2").window_size or 1 for config in configs), default=1)
    for dtype in plan.dtypes:
        layers = LAYERS if plan.layers is None else plan.layers
        model = load_gpt2(plan.checkpoint, max(plan.lengths) + steps, layers, plan.heads, plan.head_dim)
        model = model.to(plan.device, DTYPES[dtype])
        ids = torch.randint(model.config.vocab_size, (plan.batch, max(plan.lengths) + steps)).to(plan.device)
        heads, width = model.config.n_head, model.config.n_embd
        title = Path(plan.checkpoint or f"gpt2 ({model.config.n_layer} layers)").name
        for tokens in sorted(set(plan.lengths)):
            report(f"{tokens} tokens, {dtype}")
            work = Workload(tokens, plan.batch, heads, width // heads, True, dtype, device=plan.device)
            entries = []
            for contender in contenders:
                row = new_row("generation", contender, work, title)
                prepare = partial(_prepare, plan, row, model, contender.config, ids[:, : tokens + steps], steps)
                entries.append((row, prepare))
            with quiet(), torch.inference_mode():
                rows = race(entries, plan.seconds, _time_steps)
            yield rows


# -- models -----------------------------------------------------------------------------------------------------------
def _contenders(plan: Plan) -> list[Contender]:
    """Softmax, the kinds, and those whose state can be bounded once more with a bound."""
    made = []
    for contender in plan.model_contenders():
        made.append(contender)
        kind = get_kind(contender.config.kind) if contender.config else None
        if contender.config and kind and kind.bound_field and plan.max_chunks:
            name = f"{contender.name}, at most {plan.max_chunks} {kind.size_word}"
            config = contender.config.replace(**{kind.bound_field: plan.max_chunks})
            made.append(replace(contender, name=name, config=config))
    return made


def load_gpt2(
    checkpoint: str | None, positions: int, layers: int = LAYERS, heads: int = 4, head_dim: int = 64
) -> PreTrainedModel:
    """A stock GPT-2 with at least so many positions; without a checkpoint random weights of so many layers.

    Raises: `ConfigError` for a checkpoint of something else.
    """
    if checkpoint is None:
        torch.manual_seed(0)
        sizes = {"n_embd": heads * head_dim, "n_head": heads, "n_layer": layers}
        config = GPT2Config(**sizes, n_positions=positions, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa")
        found = model.config.model_type
        if found != "gpt2" or get_family(model.config).name != "gpt2":
            raise ConfigError(f"The checkpoint must be a stock GPT-2; got model_type {found!r} in {checkpoint}.")
        if model.config.n_positions < positions:
            extend_positions(model, positions)
    return model.eval()


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


# -- steps ------------------------------------------------------------------------------------------------------------
@dataclass
class GenerationRun:
    """Single-token steps behind a filled cache, which stays as it is: every call begins with a copy."""

    model: PreTrainedModel
    cache: Any
    ids: Tensor
    steps: int

    def __call__(self, cache: Any = None) -> Callable[[], None]:
        """What reads one more of the tokens at every call."""
        given = {cache_argument(self.model): copy.deepcopy(self.cache) if cache is None else cache}
        rest = iter(self.ids.split(1, dim=1))

        def step() -> None:
            self.model(input_ids=next(rest), use_cache=True, **given)
            if self.ids.is_cuda:
                torch.cuda.synchronize()  # as it is where the next token depends on this one's logits

        return step

    def most_bytes(self, steps: int) -> int:
        """What the cache holds per layer, at most within so many steps."""
        cache, most = copy.deepcopy(self.cache), 0
        step = self(cache)
        for _ in range(steps):
            step()
            most = max(most, held_bytes(*cache.layers, model=self.model))
        return most // len(cache.layers)


def _prepare(
    plan: Plan, row: Row, model: PreTrainedModel, config: AttentionConfig | None, ids: Tensor, steps: int
) -> GenerationRun:
    """Fill a cache with all but the last `steps` tokens, and note its size in the row."""
    read, rest = ids[:, :-steps], ids[:, -steps:]
    if config is None:
        check_length(row.work, plan.max_softmax_length)
        run = GenerationRun(model, fill_at_random(model, read), rest, min(steps, SOFTMAX_STEPS))
    else:
        model = converted(model, config, {"input_ids": ids}).eval()
        run = GenerationRun(model, fill(model, read, plan.piece), rest, steps)
    row.state = run.most_bytes(steps // WINDOWS)
    return run


def _time_steps(run: GenerationRun, seconds: float) -> Measurement:
    """The mean of the steps of one run; a few steps on another copy of the cache come before."""
    timer = Timer("step()", setup="step = run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.timeit(run.steps)
