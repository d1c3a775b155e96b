"""Convert, push, load back by name: the real client against a local Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import KINDS
from hub_server import run_with_hub
from huggingface_hub import ModelCard

pytestmark = pytest.mark.hub

ROUND_TRIP = """
import sys
import torch
import hf_linattn
from cases import BY_NAME, converted
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

auto = {"bert-classifier": AutoModelForSequenceClassification, "gpt2": AutoModelForCausalLM,
        "vit": AutoModelForImageClassification}
for kind in KINDS:
    for name, auto_class in auto.items():
        case = BY_NAME[name]
        stock = case.build()(**case.inputs()).logits
        model = converted(case, kind, layers=[0])  # ViT reads its answer from [CLS], which is exact in the last layer
        model.push_to_hub(f"me/{name}-{kind}")
        loaded = auto_class.from_pretrained(f"me/{name}-{kind}").eval()
        assert type(loaded) is type(model), type(loaded)
        with torch.no_grad():
            want, got = model(**case.inputs()).logits, loaded(**case.inputs()).logits
        # Not bit by bit: loaded tensors are not aligned in memory, and small matrix products then round differently.
        assert (want - got).abs().max() < 1e-5, (kind, name)
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items()), (kind, name)
        assert (want - stock).abs().max() > 1e-4, (kind, name)
"""


def test_push_and_load_back_by_name(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, 'tests'); KINDS = {KINDS!r}" + ROUND_TRIP
    hub = run_with_hub(code, tmp_path)

    assert len(hub.repos) == 3 * len(KINDS)
    for name, repo in hub.repos.items():
        files = repo.commits[repo.branches["main"]]
        assert {"README.md", "config.json", "model.safetensors"} <= set(files)
        assert not [path for path in files if path.endswith((".bin", ".pt", ".pkl"))]
        card = ModelCard(hub.blobs[files["README.md"]].decode())
        assert card.data.library_name == "transformers"
        assert {"linear-attention", name.rsplit("-", 1)[1]} <= set(card.data.tags)
        assert f'from_pretrained("{name}")' in card.text


def test_missing_repository_and_file_are_told_apart(tmp_path: Path) -> None:
    run_with_hub(
        """
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
api = HfApi()
for arguments, expected in [(("me/none", "a"), RepositoryNotFoundError), (("me/some", "a"), EntryNotFoundError)]:
    api.create_repo("me/some", exist_ok=True)
    try:
        hf_hub_download(*arguments)
    except expected:
        continue
    raise SystemExit(f"no {expected}")
try:
    hf_hub_download("me/some", "a", revision="none")
except RevisionNotFoundError:
    pass
else:
    raise SystemExit("no RevisionNotFoundError")
""",
        tmp_path,
    )
