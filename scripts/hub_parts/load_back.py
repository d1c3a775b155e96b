"""Load a pushed model in a process that knows nothing but its name, run it, and say what came.

python scripts/hub_parts/load_back.py REPOSITORY AUTO_CLASS INPUTS OUTPUT        # two safetensors files
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from weights import digest_of_all

import hf_linattn  # noqa: F401  # registers the kinds and the converted classes


def main(repo: str, auto: str, inputs: str, output: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    model, info = getattr(transformers, auto).from_pretrained(repo, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(**load_file(inputs)).logits
    save_file({"logits": logits.contiguous()}, output)
    found = {
        "class": type(model).__name__,
        "attention": model.config._attn_implementation,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "weights": digest_of_all(model),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
