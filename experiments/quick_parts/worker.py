"""A process that measures one checkout, which comes first in PYTHONPATH. It answers every line with a line.

{"figure": NAME}               builds it and calls it twice (a slow one once) -> {"seconds": of the last call}
{"figure": NAME, "calls": N}   one sample of the figure built last            -> {"seconds": of the fastest call}
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from quick_parts.figures import all_figures


def seconds(call: Callable[[], object], threads: int) -> float:
    """Of one call. What has measured itself returns a number.

    With one thread processor time counts, which other processes lengthen little; with more threads that would count
    those which wait, so it is the time of the clock.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    found = call()
    return found if isinstance(found, float) else clock() - start


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")
    import torch
    import transformers

    import hf_linattn

    transformers.logging.set_verbosity_error()
    print(json.dumps({"package": str(Path(hf_linattn.__file__).parent)}), file=answers, flush=True)
    figures = {figure.name: figure for figure in all_figures()}
    built: Callable[[], object] = lambda: None  # noqa: E731
    for line in sys.stdin:
        request = json.loads(line)
        try:
            figure = figures[request["figure"]]
            if "calls" not in request:
                built = lambda: None  # noqa: E731  # what the last figure held is free before the next is built
                gc.collect()
                torch.set_num_threads(figure.threads)
                torch.manual_seed(0)
                built = figure.build()
                taken = seconds(built, figure.threads)
            gc.collect()
            gc.disable()
            if "calls" in request or taken < 1:
                taken = min(seconds(built, figure.threads) for _ in range(request.get("calls", 1)))
            answer: dict[str, object] = {"seconds": taken}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        gc.enable()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
