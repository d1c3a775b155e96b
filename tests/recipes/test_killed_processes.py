"""Every recipe, killed on two processes within a save, goes on by itself and ends with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_groups import RECIPES, Groups, Kill

QUICK = [("text_classification", (1,))]
CASES = [(recipe, ranks) for recipe in RECIPES for ranks in ((0,), (1,), (0, 1))]


@pytest.mark.parametrize(
    ("recipe", "ranks"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_killed_within_a_save(groups: Groups, tmp_path: Path, recipe: str, ranks: tuple[int, ...]) -> None:
    """The first process while it writes the optimizer or before, the second before it has told the first."""
    killed = groups.run(recipe, tmp_path, kill=Kill(ranks, save=2, state=9 if ranks[0] == 0 else 1))
    assert all(killed.statuses[rank] == -9 for rank in ranks), "\n".join(killed.logs)
    assert all(status for status in killed.statuses)
    # The process that is left does not wait: neither for the other one, nor for the launcher.
    assert all((seconds or 0) < 10 for seconds in killed.seconds_after)
    assert not (tmp_path / "output" / "checkpoint-4" / "trainer_state.json").exists()
    again = groups.assert_goes_on(recipe, tmp_path)
    assert again.matching(r"Resuming from \S*/(checkpoint-\d+)") == ["checkpoint-2"]
    # What is named: one line a damaged checkpoint, once though two processes look.
    assert len(again.matching(r"Skipping \S*/checkpoint-4, which is incomplete: ")) == 1
    assert "Skipping" not in again.logs[1]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("state", [1, 6, 20, 60])
def test_killed_while_the_model_is_saved_at_the_end(
    groups: Groups, tmp_path: Path, ranks: tuple[int, ...], state: int
) -> None:
    kill = Kill(ranks, save=4, state=state) if ranks[0] == 0 else Kill(ranks, event="save 4")
    groups.run("text_classification", tmp_path, kill=kill)
    again = groups.assert_goes_on("text_classification", tmp_path)
    assert again.matching(r"Resuming from \S*/(checkpoint-\d+)") == ["checkpoint-6"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        Kill((0,), stage="transfer ", save=1, state=6),
        Kill((1,), stage="transfer ", save=2, state=1),
        Kill((0, 1), event="transfer step 4"),
        Kill((0,), event="step 1"),  # of training, before its first checkpoint
    ],
    ids=str,
)
def test_killed_in_attention_transfer(groups: Groups, tmp_path: Path, kill: Kill) -> None:
    killed = groups.run("image_classification", tmp_path, kill=kill)
    assert -9 in killed.statuses
    again = groups.assert_goes_on("image_classification", tmp_path)
    goes_on = again.matching(r"Attention transfer goes on from \S*/(checkpoint-\d+)")
    expected = {"transfer step 4": ["checkpoint-2"], "step 1": ["checkpoint-4"]}
    assert goes_on == expected.get(kill.event or "", [] if kill.save == 1 else ["checkpoint-2"])
