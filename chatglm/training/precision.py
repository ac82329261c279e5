"""Owns the number format that a training computes in: the configuration's, whoever launches it.

accelerate takes the format from the environment where its launcher has one, and transformers 4
writes that of each run there, where it would stay for the next one of the same process.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from chatglm.training.settings import KeyProblem

LAUNCHER = "ACCELERATE_MIXED_PRECISION"


def get_compute_dtype(arguments: Any) -> torch.dtype | None:
    """Return what `bf16` or `fp16` say that a training computes in; None for float32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[name_format(vars(arguments))]


def name_format(keys: Mapping[str, Any]) -> str:
    """Return accelerate's name of the format that `bf16` or `fp16` ask for; "no" is float32."""
    return next((name for name in ("bf16", "fp16") if keys.get(name)), "no")


def check_launcher(keys: Mapping[str, Any]) -> None:
    """Refuse a launcher that asks for another number format than the configuration.

    Args:
        keys: those of the configuration.

    Raises:
        KeyProblem: naming both formats.
    """
    launched, own = os.environ.get(LAUNCHER, "no"), name_format(keys)
    if launched not in ("no", own):
        remedy = f"set {launched}: true" if launched in ("bf16", "fp16") else "use bf16 or fp16"
        raise KeyProblem(
            f"accelerate's launcher asks for mixed_precision {launched} ({LAUNCHER}), the "
            f"configuration for {own}: {remedy} in the configuration, or no in the launcher"
        )


@contextmanager
def keep_launcher() -> Iterator[None]:
    """Leave the environment of a run as it was found, for the next run of this process."""
    before = os.environ.get(LAUNCHER)
    try:
        yield
    finally:
        os.environ.pop(LAUNCHER, None)
        if before is not None:
            os.environ[LAUNCHER] = before


__all__ = ["check_launcher", "get_compute_dtype", "keep_launcher", "name_format"]
