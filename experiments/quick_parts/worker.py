"""A process that measures one checkout: reads a request per line, measures, answers with a line.

    {"figure": NAME}               builds it, calls it twice (a slow one once) -> {"seconds": of the last call}
    {"figure": NAME, "calls": N}   one sample of N calls      -> {"seconds": of the fastest call}

Started by `turns.Worker`, with the checkout first in PYTHONPATH.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

from quick_parts.figures import Sample, all_figures


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    import torch

    figures = {figure.name: figure for figure in all_figures()}
    name, sample = "", None

    def measure(request: dict[str, Any]) -> float:
        nonlocal name, sample
        if "calls" not in request:
            name, sample = "", None  # what the last figure held is free before the next is built
            gc.collect()
            figure = figures[request["figure"]]
            torch.set_num_threads(figure.threads)
            torch.manual_seed(0)
            built: Sample = figure.build()
            start = time.perf_counter()
            once = built(1)
            name, sample = figure.name, built
            if time.perf_counter() - start > 1:
                return once
        if sample is None or name != request["figure"]:
            raise RuntimeError(f"{request['figure']!r} has not been built; built is {name!r}.")
        gc.collect()
        gc.disable()
        try:
            return sample(request.get("calls", 1))
        finally:
            gc.enable()

    for line in requests:
        try:
            answer: dict[str, Any] = {"seconds": measure(json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")
    import transformers

    import hf_linattn

    transformers.logging.set_verbosity_error()
    print(json.dumps({"package": str(Path(hf_linattn.__file__).parent)}), file=answers, flush=True)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
