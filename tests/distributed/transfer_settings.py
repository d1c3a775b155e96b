"""Settings that learn, for attention transfer on several processes."""

from __future__ import annotations

from typing import Any

from cases import GPT2, VIT, ModelCase

import hf_linattn
from hf_linattn import EvaConfig, FavorPlusConfig, LaraConfig

FAVOR = FavorPlusConfig(learned=True, num_features=8, window_size=4)
LARA = LaraConfig(learned=True, num_landmarks=8, window_size=4)
EVA = EvaConfig(learned=True, num_chunks=8, chunk_size=2, window_size=4)


def transferable(case: ModelCase, settings: Any) -> Any:
    """A converted model, calibrated if it has to be."""
    settings = settings.replace(window_size=2) if case is VIT else settings
    model = case.build() if case is GPT2 else case.build(attention_probs_dropout_prob=0.0)
    model = hf_linattn.convert(model, settings)
    return hf_linattn.calibrate(model, [case.inputs(4)]) if hf_linattn.needs_calibration(model) else model
