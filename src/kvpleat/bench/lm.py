"""EleutherAI's lm-eval with every request on a compressed cache: any of its tasks, for any method of the judge.

What is compressed: a request's context is the prompt, and the method compresses at its end; continuations and generated
text are decoded on what is left. Where a task has no context, see `lm_adapter.split_window`.

lm-eval is an optional dependency and slow to import, so it is imported only when it runs.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvpleat.bench.methods import Method
from kvpleat.errors import OptionError
from kvpleat.hf.models import LoadedModel


def run_lm_eval(
    loaded: LoadedModel,
    method: Method,
    tasks: list[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    seed: int = 0,
    *,
    lengths: tuple[int, ...] = (4096,),
) -> dict[str, Any]:
    """Run tasks of lm-eval with a method. Methods that run one after the other in one process get the same items.

    Args:
        tasks: names that lm-eval knows, or that a YAML file in `include_path` defines.
        limit: items of each task; None: all.
        num_fewshot: examples before each question; None: as the task has it.
        seed: of the items that are drawn, the examples and sampling.
        lengths: tokens of the items that RULER's tasks make; lm-eval reports 4096, 8192, ... up to 131072.

    Returns:
        "results", "versions", "n-shot" and "n-samples" as lm-eval returns them, JSON-ready; and "samples": for each
        task a list of {"doc": index, "hash": of the item, "filter": name, "scores": {metric: value}}. Pair methods by
        "doc" and "filter", and check that "hash" is the same. RULER's scores are named by length, and are -1 under the
        lengths that an item does not have.

    Raises:
        OptionError: lm-eval is missing, or a task is unknown, has no data here, or asks for what is not served.
    """
    adapter, evaluate = _lm_eval()
    if include_path is not None and not include_path.is_dir():
        raise OptionError(
            f"include_path={include_path} is no folder, so it holds no tasks. Pass the folder of the YAML."
        )
    folder = str(loaded.tokenizer.name_or_path)
    manager = _tasks(tuple(tasks), include_path, folder, lengths, num_fewshot, seed)
    with contextlib.redirect_stdout(sys.stderr):  # some tasks print while they make their items
        out = evaluate(
            adapter.CompressedLM(loaded, method, seed),
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    found = {key: _plain(out[key]) for key in ("results", "versions", "n-shot", "n-samples")}
    return {**found, "samples": {task: [_sample(s) for s in samples] for task, samples in out["samples"].items()}}


def _lm_eval() -> tuple[Any, Callable[..., Any]]:
    """The adapter's module and lm-eval's entry. Raises OptionError where lm-eval is missing."""
    try:
        from lm_eval.evaluator import simple_evaluate

        from kvpleat.bench import lm_adapter
    except ImportError as error:
        raise OptionError(
            f"Tasks of lm-eval need the package lm-eval, which cannot be imported ({error}). Run: pip install "
            "'kvpleat[judge]'"
        ) from error
    return lm_adapter, simple_evaluate


@functools.lru_cache(maxsize=1)
def _tasks(
    tasks: tuple[str, ...],
    include_path: Path | None,
    folder: str,
    lengths: tuple[int, ...],
    num_fewshot: int | None,
    seed: int,
) -> Any:
    """The tasks of the latest call, kept for the next method: reading lm-eval's list takes seconds, and some items are
    drawn with random numbers that lm-eval does not start anew (ruler_cwe)."""
    adapter, _ = _lm_eval()
    metadata = {"tokenizer": folder, "max_seq_lengths": list(lengths)}
    if include_path is not None:
        own = adapter.KeptTasks(include_path=str(include_path), include_defaults=False, metadata=metadata)
        if set(tasks) <= set(own.all_tasks):
            return own
    return adapter.KeptTasks(include_path=None if include_path is None else str(include_path), metadata=metadata)


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    scores = {name: _plain(sample[name]) for name in sample["metrics"]}
    return {"doc": sample["doc_id"], "hash": sample["doc_hash"], "filter": sample["filter"], "scores": scores}


def _plain(value: Any) -> Any:
    """A value as JSON has it: numpy's numbers as Python's, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
