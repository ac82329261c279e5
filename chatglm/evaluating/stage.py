"""Owns the stage `eval`: one model is measured, or a matrix of several.

Does not know how either is done (`evaluation`, `matrix`).
"""

from dataclasses import dataclass
from typing import Any

from chatglm.evaluating.evaluation import measure_one
from chatglm.evaluating.matrix import measure_matrix
from chatglm.evaluating.settings import EvalSettings
from chatglm.loading import choose_device
from chatglm.training.paths import check_paths
from chatglm.training.processes import require_one_process
from chatglm.training.stage import Stage


@dataclass
class EvalArguments:
    """No keys of a library: all are in `EvalSettings`."""


def main(settings: EvalSettings, given: dict[str, Any]) -> dict[str, Any]:
    """Measure, and return what was written to `eval.json`, or of a matrix to `matrix.json`.

    Args:
        settings: ours.
        given: nothing.

    Raises:
        ValueError: for settings, data, a model or a folder that cannot be used.
        ImportError: if a package that compares texts is missing.
    """
    require_one_process("eval")
    choose_device(settings.device or None)
    check_paths(settings)
    return (measure_matrix if settings.matrix else measure_one)(settings, given)


STAGE = Stage("eval", EvalSettings, EvalArguments, main)

__all__ = ["STAGE", "EvalArguments", "main"]
