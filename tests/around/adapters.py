"""Adapters (PEFT) round converted models, and what they compute."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import BY_NAME, VIT, ModelCase
from torch import Tensor

peft = pytest.importorskip("peft")

CLASSIFIER = BY_NAME["bert-classifier"]
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "vit": ["q_proj", "v_proj"]}
TASKS = {"bert-classifier": "SEQ_CLS", "bert-mlm": "FEATURE_EXTRACTION", "gpt2": "CAUSAL_LM", "vit": None}


def adapter(case: ModelCase, method: str, **changes: Any) -> Any:
    """An adapter's config, of values as if trained where the method has such a choice."""
    task = TASKS[case.name]
    targets = {"target_modules": TARGETS[case.name.split("-")[0]], "task_type": task, **changes}
    tokens = {"num_virtual_tokens": 4, "task_type": task, **changes}
    return {
        "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **targets),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], init_ia3_weights=False, **targets),
        "loha": lambda: peft.LoHaConfig(r=4, init_weights=False, **targets),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, init_weights=False, **targets),
        "prefix": lambda: peft.PrefixTuningConfig(**tokens),
        "prompt": lambda: peft.PromptTuningConfig(**tokens),
        "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **tokens),
    }[method]()


def wrap(model: Any, config: Any) -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about Conv1D
        return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def outputs(model: Any, **inputs: Tensor) -> Tensor:
    found = model.eval()(**inputs)
    return found.logits if "logits" in found else found[0]  # type: ignore[no-any-return]


def inputs_of(case: ModelCase) -> dict[str, Tensor]:
    """A batch with a padded row, short enough for virtual tokens beside it."""
    inputs = case.inputs()
    if case is VIT:
        return inputs
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, 25:] = 0
    return {"input_ids": inputs["input_ids"][:, :32], "attention_mask": mask}
