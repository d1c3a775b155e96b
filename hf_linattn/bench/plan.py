"""Everything that a run covers, and how its contenders are timed beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch.utils.benchmark import Measurement

from ..errors import ConfigError
from ..modules.registry import list_kinds
from .kinds import SIZES, KindOptions, kind_contender
from .peers import peer_contenders
from .results import Row, with_ratios
from .timing import Failure, explain, time_calls, time_in_turns
from .workload import DTYPES, MODES, Contender, Workload, choose

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure. `models` and `generation` take directions and sizes from their models.

    Args:
        lengths: Numbers of tokens; in `generation` of the context.
        windows: Window sizes for every kind; 0 is none (EVA, which needs one, then takes `options.eva_window`), `None`
            the default of the model family.
        causal: Directions to run: False, True or both.
        seconds: Time for each contender at each workload.
        max_softmax_length: Longest input for softmax; `None` for no limit.
        beside: Other options that every kind also runs with, in the same turns.
        models: Names of `models.MODELS`, with so many `layers`; `None` for their own, in `generation` for 4.
        most_tokens: Of a batch of `models`: longer inputs have fewer rows. `None` for no limit.
        checkpoint: A GPT-2 for `generation` instead of random weights; positions that it does not have are added.
        max_chunks: In `generation` also run kinds whose state can be bounded, with this bound; 0 for not.
        piece: Tokens per call while `generation` fills its caches.

    Raises: `ConfigError` for impossible values and unknown names.
    """

    lengths: tuple[int, ...]
    kinds: tuple[str, ...] = ()
    windows: tuple[int | None, ...] = (0,)
    causal: tuple[bool, ...] = (False, True)
    dtypes: tuple[str, ...] = ("float32",)
    modes: tuple[str, ...] = MODES
    peers: tuple[str, ...] = ("sdpa",)
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    options: KindOptions = field(default_factory=KindOptions)
    beside: tuple[KindOptions, ...] = ()
    device: str = "cpu"
    threads: int = 1
    seconds: float = 2.0
    max_softmax_length: int | None = 16384
    models: tuple[str, ...] = ("minilm", "bert", "gpt2", "vit")
    layers: int | None = None
    most_tokens: int | None = None
    checkpoint: str | None = None
    max_chunks: int = 64
    piece: int = 2048

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths must be integers >= 1, at least one of them; got {list(self.lengths)}.")
        named = {"kinds": list_kinds(), "dtypes": DTYPES, "modes": MODES}
        for field_name, allowed in named.items():
            for name in getattr(self, field_name):
                choose(field_name, name, allowed)
        choose("device", self.device, ("cpu", "cuda"))
        for name in ("batch", "heads", "head_dim", "threads", "piece"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be an integer >= 1; got {getattr(self, name)!r}.")
        if self.seconds <= 0:
            raise ConfigError(f"seconds must be > 0; got {self.seconds!r}.")
        self.contenders()

    def kind_contenders(self) -> list[Contender]:
        """Every kind with all options and every window."""
        every = product((self.options, *self.beside), self.kinds, self.windows)
        made = [kind_contender(kind, replace(options, window_size=window)) for options, kind, window in every]
        return list({contender.name: contender for contender in made}.values())

    @property
    def peer_features(self) -> int:
        return self.options.num_features or SIZES["num_features"]

    def contenders(self) -> list[Contender]:
        """Softmax and the other libraries, then the kinds."""
        peers = peer_contenders(self.peers, self.device, self.peer_features, self.max_softmax_length)
        return [*peers, *self.kind_contenders()]

    def model_contenders(self) -> list[Contender]:
        """Softmax as Transformers computes it, which has no settings, then the kinds."""
        return [peer_contenders(("sdpa",), self.device, self.peer_features)[0], *self.kind_contenders()]

    def workloads(self, *modes: str) -> list[Workload]:
        """All workloads, short ones first within a direction, dtype and mode."""
        return [
            Workload(tokens, self.batch, self.heads, self.head_dim, causal, dtype, mode, self.device)
            for causal, dtype, mode in product(self.causal, self.dtypes, modes or self.modes)
            for tokens in sorted(set(self.lengths))
        ]


def new_row(benchmark: str, contender: Contender, work: Workload, model: str = "") -> Row:
    """The row of a contender before anything is measured."""
    settings = contender.config.to_dict() if contender.config is not None else None
    return Row(benchmark, contender.name, contender.group, work, model, settings=settings)


def race(
    entries: Iterable[tuple[Row, Callable[[], Any]]],
    seconds: float,
    measure: Callable[[Any, float], Measurement] = time_calls,
) -> list[Row]:
    """Time steps beside each other.

    Args:
        entries: Rows, each with what makes its step. What cannot be made or run becomes the row's `reason`.
        seconds, measure: Those of `time_in_turns`.
    Returns: The rows with their times and ratios to the fastest softmax.
    """
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], object]] = {}
    for row, make in entries:
        rows[row.name] = row
        try:
            steps[row.name] = make()
        except Exception as error:
            row.reason = explain(error)
    for name, found in time_in_turns(steps, seconds=seconds, measure=measure).items():
        row = rows[name]
        if isinstance(found, Failure):
            row.reason = found.reason
        else:
            row.median, row.minimum, row.samples = found.median, min(found.times), len(found.times)
    return with_ratios(list(rows.values()))
