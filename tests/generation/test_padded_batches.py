"""Left-padded batches: every row generates what it generates alone, whatever the other rows look like."""

from __future__ import annotations

import pytest
import torch
from cases import ModelCase, largest
from decoders import (
    BERT,
    BY_NAME,
    GPT2,
    PAD,
    TOLERANCE,
    WINDOW,
    Setting,
    all_kinds,
    all_settings,
    both,
    check_replay,
    decoder,
    left_padded,
    run,
    some_kinds,
)
from hypothesis import given, settings
from hypothesis import strategies as st

# None, less than a chunk, a window, and more than three windows; rows are at different places of their windows.
PADDINGS = [0, 3, WINDOW, 29]
TOKENS = 37


@pytest.mark.compat("padding")
@all_settings
def test_rows_equal_their_unpadded_selves(setting: Setting) -> None:
    model, batch = decoder(GPT2, setting), left_padded(PADDINGS, TOKENS)
    check_replay(model, *run(model, 20, **batch), PADDINGS)


@all_kinds
def test_rows_equal_their_unpadded_selves_in_bert(setting: Setting) -> None:
    model, batch = decoder(BERT, setting), left_padded(PADDINGS, TOKENS)
    check_replay(model, *run(model, 20, **batch), PADDINGS)


@both
@some_kinds
def test_generated_alone(case: ModelCase, setting: Setting) -> None:
    """The same with `generate` on both sides, and without a cache."""
    model, batch = decoder(case, setting), left_padded([5, 0, 21], 30)
    together, chosen_from = run(model, 12, **batch)
    full, full_logits = run(model, 12, **batch, use_cache=False)
    assert torch.equal(together, full)
    assert largest(chosen_from - full_logits) < TOLERANCE
    for row, padding in enumerate([5, 0, 21]):
        alone, _ = run(model, 12, input_ids=batch["input_ids"][row : row + 1, padding:])
        assert torch.equal(alone[0], together[row, padding:])


@both
@some_kinds
def test_mask_inferred_from_the_padding_token(case: ModelCase, setting: Setting) -> None:
    model, batch = decoder(case, setting), left_padded(PADDINGS, TOKENS)
    assert int((batch["input_ids"] == PAD).sum()) == sum(PADDINGS)
    given_mask, _ = run(model, 10, **batch)
    inferred, inferred_logits = run(model, 10, input_ids=batch["input_ids"])
    assert torch.equal(given_mask, inferred)
    check_replay(model, inferred, inferred_logits, PADDINGS)
    unmasked, _ = run(model, 10, **{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})
    assert not torch.equal(unmasked, inferred), "padding makes no difference: the test proves nothing"


@pytest.mark.parametrize("name", ["favor_plus", "favor_plus-overlap", "lara-no-window", "eva", "eva-overlap"])
def test_generation_with_any_padding(name: str) -> None:
    model = decoder(GPT2, BY_NAME[name])

    @settings(max_examples=4, derandomize=True, database=None)
    @given(st.lists(st.integers(0, 27), min_size=2, max_size=4), st.integers(28, 36))
    def check(paddings: list[int], tokens: int) -> None:
        check_replay(model, *run(model, 10, **left_padded(paddings, tokens)), paddings)

    check()


@all_kinds
def test_rows_that_end_early(setting: Setting) -> None:
    """A finished row goes on with padding tokens, which leaves the others alone."""
    model, batch = decoder(GPT2, setting), left_padded([4, 0, 11], 25)
    free, _ = run(model, 24, **batch)
    end = int(free[0, 25 + 3])  # the first row stops here, others where they choose this token, if at all
    stopped, _ = run(model, 24, **batch, eos_token_id=end)
    assert bool((stopped[0, 25 + 4 :] == PAD).all())
    for row in range(3):
        ends = (free[row, 25:] == end).nonzero()
        length = 25 + (int(ends[0]) + 1 if len(ends) else 24)
        length = min(length, stopped.shape[1])
        assert torch.equal(stopped[row, :length], free[row, :length])
    assert stopped.shape[1] > 25 + 4, "all rows stop at once: the test proves nothing"
