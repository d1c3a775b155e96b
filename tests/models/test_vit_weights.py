"""ViT's weights have other names in checkpoints than in the model; none may get lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KINDS, VIT, logits
from transformers import Trainer, TrainingArguments, ViTModel

import hf_linattn
from hf_linattn.models import COUNTERPARTS


def encoder(model: Any) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "linattn" not in name}
    assert len(state) > 30
    return state


@pytest.mark.parametrize("stock", [cls for cls in COUNTERPARTS if "ViT" in cls.__name__])
@pytest.mark.parametrize("original_names", [True, False])
def test_stock_checkpoint(stock: Any, original_names: bool, tmp_path: Path) -> None:
    model = stock(VIT.config()).eval()
    model.save_pretrained(tmp_path, save_original_format=original_names)
    loaded, info = COUNTERPARTS[stock].from_pretrained(
        tmp_path, linear_attention=VIT.settings("favor_plus"), output_loading_info=True
    )
    assert all("linattn" in name for name in info["missing_keys"]), info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = encoder(model)
    for name, tensor in encoder(loaded).items():
        assert torch.equal(tensor, expected[name]), name


def test_stock_base_into_a_head(tmp_path: Path) -> None:
    base = ViTModel(VIT.config(), add_pooling_layer=False)
    base.save_pretrained(tmp_path)
    head = hf_linattn.LinAttnViTForImageClassification.from_pretrained(tmp_path, linear_attention="favor_plus")
    for name, tensor in encoder(base).items():
        assert torch.equal(head.vit.state_dict()[name], tensor), name


@pytest.mark.parametrize("original_names", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_converted_checkpoint(kind: str, original_names: bool, tmp_path: Path) -> None:
    model = hf_linattn.convert(VIT.build(), VIT.settings(kind))
    model.save_pretrained(tmp_path, save_original_format=original_names)
    loaded = VIT.auto.from_pretrained(tmp_path)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 24, 24, generator=generator), "labels": index % 2}


def train(model: Any, folder: Path, steps: int, **resume: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
        dataloader_num_workers=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Images())
    trainer.train(**resume)
    return trainer.model


def test_trainer_resume(tmp_path: Path) -> None:
    """A run resumed from its checkpoint ends with the weights of the uninterrupted run, on a model built anew."""
    settings = VIT.settings("lara")
    whole = train(hf_linattn.convert(VIT.build(), settings), tmp_path / "run", 4)
    torch.manual_seed(99)
    fresh = hf_linattn.convert(
        VIT.stock(VIT.config()), settings
    )  # other random weights: all must come from the checkpoint
    resumed = train(fresh, tmp_path / "run", 4, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    loaded = VIT.auto.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.allclose(logits(loaded, **VIT.inputs()), logits(resumed.eval(), **VIT.inputs()), atol=1e-5)
