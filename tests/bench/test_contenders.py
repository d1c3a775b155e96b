"""What is run: every implementation computes attention, on the same numbers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_linattn.bench import kinds, peers
from hf_linattn.bench.attention import run_attention
from hf_linattn.bench.kinds import SIZES, KindOptions, kind_contender
from hf_linattn.bench.models import MODELS, run_models
from hf_linattn.bench.peers import peer_contenders
from hf_linattn.bench.plan import Plan
from hf_linattn.bench.workload import Unavailable, Workload, make_inputs, make_step
from hf_linattn.errors import ConfigError
from hf_linattn.modules.config import AttentionConfig
from hf_linattn.modules.kinds.favor_plus import FavorPlusConfig
from hf_linattn.modules.registry import get_kind, list_kinds
from hf_linattn.ops.favor.attention import favor_attention

SMALL = Workload(65, batch=2, heads=2, head_dim=16)
OPTIONS = KindOptions(num_features=32, num_landmarks=8, num_chunks=8)
EXACT_IS_NEW = all(field.name != "exact_below" for field in fields(AttentionConfig))
LEARNED = KindOptions(num_features=8, window_size=None, learned=True)


def peer(name: str):
    return next(p for p in peer_contenders(peers.PEERS, "cpu", 32) if p.name == name)


@pytest.mark.parametrize("options", [OPTIONS, LEARNED], ids=["random", "learned"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", list_kinds())
def test_a_training_step_gives_finite_gradients(kind: str, is_causal: bool, options: KindOptions) -> None:
    work = replace(SMALL, is_causal=is_causal, mode="forward+backward")
    inputs = make_inputs(work)
    grads = make_step(kind_contender(kind, options).build(work), inputs, work)()
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs[:3]]
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "sdpa:flash", "sdpa:math"])
def test_softmax_is_softmax(name: str, is_causal: bool) -> None:
    work = replace(SMALL, is_causal=is_causal)
    query, key, value, _ = make_inputs(work)
    output = peer(name).build(work)(query, key, value)
    output = output.transpose(1, 2) if name == "sdpa" else output
    expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=is_causal)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_performer_has_our_directions(is_causal: bool) -> None:
    """With them it computes what FAVOR+ computes, but for the constant it adds to every feature."""
    work = replace(SMALL, is_causal=is_causal)
    query, key, value, _ = make_inputs(work)
    query, key = query / 2, key / 2  # smaller inputs, larger features, which the constant matters less to
    with torch.no_grad():
        theirs = peer("performer-pytorch").build(work)(query, key, value)
    projection = peers.directions(work, 32)
    ours = favor_attention(query, key, value, projection=projection, scaling=16**-0.5, is_causal=is_causal)
    other = favor_attention(query, key, value, projection=projection.flip(1), scaling=16**-0.5, is_causal=is_causal)
    assert (theirs - ours).norm() < 0.05 * (theirs - other).norm()


def test_features_for_a_kernel_that_takes_them() -> None:
    """Their causal products, normalised, are FAVOR+ with the same directions."""
    query, key, value, _ = make_inputs(SMALL)
    projection = peers.directions(SMALL, 32)
    features = [peers.linear_attention_features(tensor / 2, projection) for tensor in (query, key)]
    weights = (features[0] @ features[1].mT).tril()
    theirs = weights / weights.sum(-1, keepdim=True) @ value
    ours = favor_attention(query / 2, key / 2, value, projection=projection, scaling=16**-0.5, is_causal=True)
    assert (theirs - ours).norm() < 0.02 * ours.norm()


def test_our_first_head_has_the_directions_of_the_peers() -> None:
    query, key, value, _ = make_inputs(SMALL)
    with torch.no_grad():
        output = kind_contender("favor_plus", OPTIONS).build(SMALL)(query, key, value).transpose(1, 2)
    expected = favor_attention(query, key, value, projection=peers.directions(SMALL, 32), scaling=16**-0.5)
    torch.testing.assert_close(output[:, 0], expected[:, 0], atol=1e-5, rtol=1e-4)


def test_inputs_are_laid_out_as_models_lay_them_out() -> None:
    query = make_inputs(SMALL)[0]
    assert query.shape == (2, 2, 65, 16)
    assert query.transpose(1, 2).is_contiguous()


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match=r"not installed|needs a GPU"):
        peer("flash-linear-attention").build(SMALL)
    monkeypatch.setattr(peers, "MEMORY_SHARE", 1e-6)
    for name in ("sdpa:math", "performer-pytorch"):
        with pytest.raises(Unavailable, match=r"needs about \d+\.\d GiB"):
            peer(name).build(Workload(65536, is_causal=True, mode="forward+backward"))
    monkeypatch.setitem(sys.modules, "performer_pytorch", None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="not installed"):
        peer("performer-pytorch").build(SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": ()}, "at least one"),
        ({"lengths": (0,)}, ">= 1"),
        ({"kinds": ("favour_plus",)}, "Did you mean 'favor_plus'"),
        ({"dtypes": ("float8",)}, "float32"),
        ({"modes": ("backward",)}, "forward"),
        ({"peers": ("flash",)}, "performer-pytorch"),
        ({"seconds": 0}, "> 0"),
        ({"heads": 0}, "heads"),
        ({"windows": (-1,)}, "window_size"),
        ({"device": "tpu"}, "cuda"),
        ({"piece": 0}, "piece"),
    ],
)
def test_impossible_plans(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**{"lengths": (16,), "kinds": ("eva",), **change})


def test_softmax_stops_where_told() -> None:
    plan = Plan((16, 32), ("lara",), causal=(False,), modes=("forward",), seconds=1e-3, max_softmax_length=16)
    short, long = run_attention(plan)
    assert all(row.ratio is not None for row in short)
    assert {row.name: row.reason for row in long}["sdpa"] == "longer than the 16 tokens set for softmax"
    ours = long[-1]
    assert ours.name == "lara"
    assert ours.median > 0
    assert ours.ratio is None


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    plan = Plan((36,), ("favor_plus", "lara"), seconds=1e-3, options=OPTIONS, modes=("forward+backward",))
    (rows,) = run_models(replace(plan, models=(name,), layers=1))
    assert [row.name for row in rows] == ["sdpa", "favor_plus, converted", "lara, converted"]
    for row in rows:
        assert row.tokens_per_second > 0, row
        assert row.ratio > 0
    assert rows[0].work.tokens == (37 if name == "vit" else 36)


def test_several_settings_in_one_run() -> None:
    """Random and learned maps beside each other, and as many rows of a length as the tokens of a batch allow."""
    plan = Plan((36,), ("favor_plus",), windows=(None,), seconds=1e-3, options=OPTIONS, modes=("forward",), batch=5)
    plan = replace(plan, beside=(LEARNED,), models=("minilm",), layers=1, most_tokens=80)
    (rows,) = run_models(plan)
    assert [row.name for row in rows] == ["sdpa", "favor_plus, converted", "favor_plus, learned, converted"]
    assert [row.settings and row.settings["num_features"] for row in rows] == [None, 32, 8]
    assert {row.work.batch for row in rows} == {2}
    assert all(row.ratio > 0 for row in rows)


@dataclass(frozen=True, kw_only=True)
class FakeConfig(FavorPlusConfig):
    exact_below: int = 0


def test_exact_below_is_a_setting_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    if EXACT_IS_NEW:  # a version whose kinds do not have it yet
        KindOptions().config("favor_plus")
        monkeypatch.setattr(kinds, "config_from_dict", FakeConfig.from_dict)
    contender = kind_contender("favor_plus", replace(OPTIONS, exact_below=40))
    assert contender.name == "favor_plus, exact below 40"
    assert contender.config.to_dict()["exact_below"] == 40


@pytest.mark.parametrize("name", ["minilm", "vit"])
def test_learned_maps_in_whole_models(name: str) -> None:
    plan = Plan((65,), tuple(list_kinds()), windows=(None,), seconds=1e-3, options=LEARNED, modes=("forward",))
    (rows,) = run_models(replace(plan, models=(name,), layers=1))
    assert [row.name for row in rows[1:]] == [f"{kind}, learned, converted" for kind in list_kinds()]
    assert all(row.ratio > 0 and row.settings["learned"] for row in rows[1:])


@pytest.mark.parametrize("kind", list_kinds())
def test_sizes_are_the_presets(kind: str) -> None:
    """Those of the bench, or of learned maps, unless they are given."""
    record = get_kind(kind)
    learned = KindOptions(learned=True).config(kind)
    assert getattr(learned, record.size_field) == getattr(record.config_cls(learned=True), record.size_field)
    assert getattr(KindOptions().config(kind), record.size_field) == SIZES[record.size_field]
    assert getattr(KindOptions(**{record.size_field: 7}, learned=True).config(kind), record.size_field) == 7


def test_unknown_model() -> None:
    plan = Plan((16,), ("eva",))
    with pytest.raises(ConfigError, match="minilm"):
        next(run_models(replace(plan, models=("t5",))))
