"""What `short_inputs.py` times: the cases of every part, with the most that each of their entries may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hf_linattn.bench.kinds import KindOptions, kind_contender
from hf_linattn.bench.models import converted, model_step, quiet, stock_model
from hf_linattn.bench.peers import peer_contenders
from hf_linattn.bench.plan import Plan
from hf_linattn.bench.workload import MODES, AttentionCall, Contender, Workload, make_inputs, make_step
from hf_linattn.modules.config import AttentionConfig
from hf_linattn.modules.registry import config_from_dict, get_kind

SDPA, PERFORMER, PLUS, SHARP = "sdpa", "performer-pytorch", "favor_plus", "favor_sharp"
WINDOW = 32
SLOTS = KindOptions(64, 64, 64, window_size=WINDOW)
LEARNED = KindOptions(16, 16, 16, window_size=WINDOW, learned=True)
# Tokens -> the most that a call may take, in times of softmax's.
ATTENTION = {64: 6.0, 128: 2.5, 256: 2.5, 512: 1.3, 1024: 1 / 1.3}
ATTENTION_LEARNED = {128: 2.0, 256: 1.4, 512: 1.0, 1024: 0.5}
EXACT, SHARP_OVER_PLUS = 1.3, 1.5
MINILM = {128: 1.3, 256: 1.2, 512: 1.0, 1024: 1 / 1.15}
MINILM_LEARNED = {128: 1.2, 256: 1.1, 512: 1.0, 1024: 1 / 1.3}
MINILM_EXACT = 1.03
# Model -> tokens, rows and the bound; two rows of GPT-2 are what a training step has memory for in 3 GiB.
OTHERS = {"gpt2": (1024, 2, 1.1), "vit": (197, 8, 1.1)}
CAUSAL_TOKENS, CAUSAL = 8192, 1 / 4
PERFORMER_LENGTHS = tuple(2**power for power in range(6, 17))


@dataclass(frozen=True)
class Run:
    """What was asked for: all cases, or those of some lengths and kinds."""

    kinds: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    seconds: float = 1.0
    batch: int = 8
    layers: int | None = None
    is_quick: bool = False

    def of(self, lengths: Sequence[int]) -> list[int]:
        """Those that were asked for; of a quick run the two shortest ones."""
        chosen = [tokens for tokens in lengths if not self.lengths or tokens in self.lengths]
        return chosen[:2] if self.is_quick else chosen


@dataclass(frozen=True)
class Entry:
    """One thing that is timed in a case, and the most it may take (`None`: no bound) in times of another one."""

    name: str
    make: Callable[[], Callable[[], object]]
    bound: float | None = None
    over: str = SDPA


@dataclass(frozen=True)
class Case:
    """What is timed in turns. `entries` makes the inputs, when its turn has come."""

    part: str
    title: str
    work: Workload
    entries: Callable[[], list[Entry]]
    is_long: bool = False  # each round is one call


# -- attention functions ----------------------------------------------------------------------------------------------
def kind(name: str, options: KindOptions) -> Callable[[Workload], AttentionCall]:
    """A kind under some settings, made when it is needed: a setting that does not exist fails one line."""
    return lambda work: kind_contender(name, options).build(work)


def call_case(
    part: str, title: str, work: Workload, builds: Callable[[], list[tuple[Any, ...]]], is_long: bool = False
) -> Case:
    """A case of attention functions: `builds` gives `(name, build, bound, over)`, the last two if there is a bound."""

    def entries() -> list[Entry]:
        inputs = make_inputs(work)

        def make(build: Callable[[Workload], AttentionCall]) -> Callable[[], object]:
            return make_step(build(work), inputs, work)

        return [Entry(name, partial(make, build), *bound) for name, build, *bound in builds()]

    return Case(part, f"{title}, {work.tokens} tokens, {work.mode}", work, entries, is_long)


def softmax() -> tuple[str, Callable[[Workload], AttentionCall]]:
    peer: Contender = peer_contenders((SDPA,), "cpu", 1)[0]
    return SDPA, peer.build


def attention(run: Run) -> Iterator[Case]:
    """Window 32 and 64 slots; FAVOR# is also held to FAVOR+'s time."""

    def builds(tokens: int) -> list[tuple[Any, ...]]:
        others = [(name, kind(name, SLOTS), ATTENTION[tokens]) for name in run.kinds if name != SHARP]
        sharp = [(SHARP, kind(SHARP, SLOTS), SHARP_OVER_PLUS, PLUS)] if SHARP in run.kinds else []
        plus = [(PLUS, kind(PLUS, SLOTS), ATTENTION[tokens])] if sharp and PLUS not in run.kinds else []
        return [softmax(), *plus, *others, *sharp]

    for tokens in run.of(list(ATTENTION)):
        for mode in MODES:
            yield call_case("attention", "64 slots", Workload(tokens, mode=mode), partial(builds, tokens))


def learned(run: Run) -> Iterator[Case]:
    def builds(tokens: int) -> list[tuple[Any, ...]]:
        return [softmax(), *((name, kind(name, LEARNED), ATTENTION_LEARNED[tokens]) for name in run.kinds)]

    for tokens in run.of(list(ATTENTION_LEARNED)):
        for mode in MODES:
            yield call_case("learned", "16 learned slots", Workload(tokens, mode=mode), partial(builds, tokens))


def exact(run: Run) -> Iterator[Case]:
    """A row inside one window, and one that is shorter than `exact_below`."""

    def builds(tokens: int) -> list[tuple[Any, ...]]:
        settings = {
            "in one window": replace(SLOTS, window_size=tokens),
            "exact below": replace(SLOTS, exact_below=tokens + 1),
        }
        pairs = [(name, words) for words in settings for name in run.kinds]
        return [softmax(), *((f"{name}, {words}", kind(name, settings[words]), EXACT) for name, words in pairs)]

    for tokens in run.of(list(ATTENTION)):
        for mode in MODES:
            yield call_case("exact", "exact", Workload(tokens, mode=mode), partial(builds, tokens))


def causal(run: Run) -> Iterator[Case]:
    """256 slots: LARA has 64 centroids with two antithetic pairs."""

    def builds() -> list[tuple[Any, ...]]:
        options = KindOptions(num_features=256, num_landmarks=64)
        names = [name for name in (PLUS, "lara") if name in run.kinds]
        return [softmax(), *((name, kind(name, options), CAUSAL) for name in names)]

    tokens = 512 if run.is_quick else CAUSAL_TOKENS
    if not run.lengths or tokens in run.lengths:
        work = Workload(tokens, is_causal=True, mode=MODES[1])
        yield call_case("causal", "causal, 256 slots", work, builds, is_long=True)


def performer(run: Run) -> Iterator[Case]:
    """The same directions on both sides."""

    def builds() -> list[tuple[Any, ...]]:
        peer: Contender = peer_contenders((PERFORMER,), "cpu", 256)[0]
        ours = kind(PLUS, KindOptions(num_features=256))
        return [(PERFORMER, peer.build), (PLUS, ours, 1.0, PERFORMER)]

    for tokens in run.of(PERFORMER_LENGTHS):
        for dtype in ("float32", "bfloat16"):
            for mode in MODES:
                work = Workload(tokens, dtype=dtype, mode=mode)
                yield call_case("performer", f"256 features, {dtype}", work, builds)


# -- whole models -----------------------------------------------------------------------------------------------------
Settings = dict[str, tuple[Callable[[str], AttentionConfig], float]]  # words -> config of a kind, and the bound


def default(kind: str) -> AttentionConfig:
    return config_from_dict({"kind": kind})


def model_case(run: Run, name: str, tokens: int, batch: int, mode: str, settings: Settings) -> Case:
    """Every kind with all settings; with "default" only where the number of slots is another one."""

    def entries() -> list[Entry]:
        plan = Plan((tokens,), batch=batch, layers=1 if run.is_quick else run.layers)
        model, inputs, work = stock_model(plan, name, tokens, mode=mode)

        def make(kind: str, config_of: Callable[[str], AttentionConfig]) -> Callable[[], object]:
            with quiet():
                return model_step(converted(model, config_of(kind), inputs), inputs, work)

        made = [Entry(SDPA, partial(model_step, model, inputs, work))]
        for words, (config_of, bound) in settings.items():
            kinds = [kind for kind in run.kinds if config_of is not default or slots_of(default(kind)) != 64]
            made += [Entry(f"{kind}, {words}", partial(make, kind, config_of), bound) for kind in kinds]
        return made

    work = Workload(tokens, batch, is_causal=name == "gpt2", mode=mode)
    return Case("models", f"{name}, {tokens} tokens, batch {batch}, {mode}", work, entries, is_long=True)


def slots_of(config: AttentionConfig) -> Any:
    return getattr(config, get_kind(config.kind).size_field)


def models(run: Run) -> Iterator[Case]:
    """The window and, of learned maps, the slots are those of the model family."""
    slots, learned_maps = replace(SLOTS, window_size=None), KindOptions(window_size=None, learned=True)
    settings: Settings
    for tokens in run.of(list(MINILM)):
        settings = {
            "64 slots": (slots.config, MINILM[tokens]),
            "default": (default, MINILM[tokens]),
            "learned": (learned_maps.config, MINILM_LEARNED[tokens]),
            "exact below": (replace(slots, exact_below=tokens + 1).config, MINILM_EXACT),
        }
        for mode in MODES:
            yield model_case(run, "minilm", tokens, 1 if run.is_quick else run.batch, mode, settings)
    for name, (tokens, batch, bound) in OTHERS.items():
        for mode in MODES if run.of([tokens]) else ():
            settings = {"learned": (learned_maps.config, bound)}
            yield model_case(run, name, tokens, 1 if run.is_quick else batch, mode, settings)


# -- all of them ------------------------------------------------------------------------------------------------------
PARTS: dict[str, Callable[[Run], Iterator[Case]]] = {
    "attention": attention,
    "learned": learned,
    "exact": exact,
    "models": models,
    "causal": causal,
    "performer": performer,
}
