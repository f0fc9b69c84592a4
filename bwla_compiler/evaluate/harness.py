"""Tasks of the LM Evaluation Harness (the package lm-eval, an optional extra) on a model that is in memory."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bwla_compiler.errors import CalibrationError, first_line
from bwla_compiler.tokens import evaluating

ZERO_SHOT = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")
"""The tasks that papers on quantization report."""


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch: int = 1
) -> dict[str, dict[str, float]]:
    """Return the figures of each task: accuracies, their standard errors, and whatever else the task counts.

    tasks: names that lm-eval knows, or YAML files of one's own. limit: examples of each task, None for all. batch:
    sequences at a time. Raises CalibrationError where lm-eval or the tokenizer is missing, or a task cannot be had.
    """
    if tokenizer is None:
        raise CalibrationError(
            "the model's folder has no tokenizer, so tasks cannot be read; save one beside the model"
        )
    evaluate, wrapper, manager = _harness()
    files = all(Path(task).suffix in (".yaml", ".yml") for task in tasks)
    try:
        with evaluating(model):
            found = evaluate(
                model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch),
                tasks=list(tasks),
                task_manager=manager(include_defaults=not files),
                limit=limit,
                log_samples=False,
                bootstrap_iters=0,
            )
    except (OSError, KeyError, ValueError, TypeError) as error:  # what it raises for tasks and data that it cannot get
        raise CalibrationError(
            f"tasks {', '.join(tasks)}: {first_line(error)}. Give names that `lm-eval ls tasks` lists, or .yaml "
            "files; their data are downloaded at first use"
        ) from error
    return {task: _figures(table) for task, table in found["results"].items()}


def _harness() -> tuple[Any, Any, Any]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CalibrationError(
            f"tasks need the package lm-eval ({error}): pip install 'bwla-compiler[eval]', or give --data"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return simple_evaluate, HFLM, TaskManager


def _figures(table: dict[str, Any]) -> dict[str, float]:
    """Return a task's numbers by name; "acc,none" is "acc" without a filter."""
    numbers = {name: value for name, value in table.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items() if name != "sample_len"}
