"""Owns the values of the library's keys that a stage starts from, where they are not the library's.

The configuration file and the flags go before them. Imports no library.
"""

from typing import Any

# Every stage on a trainer starts from these.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 3,
    "eval_steps": 500,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    # There are no unused parameters, and the search for them takes time.
    "ddp_find_unused_parameters": False,
    "report_to": ["tensorboard"],
    "seed": 42,
}
# Each stage starts from these beside, and from the second ones if it trains adapters.
STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    # The official script starts from this rate.
    "ptuning": {"learning_rate": 2e-2},
    "reward": {"max_length": None, "learning_rate": 1e-5},
    "dpo": {"max_length": None, "learning_rate": 1e-6},
    # Of early stopping: practice has no loss that says how good it is.
    "grpo": {"learning_rate": 1e-6, "metric_for_best_model": "reward"},
}
LORA_DEFAULTS: dict[str, dict[str, Any]] = {
    "reward": {"learning_rate": 1e-4},
    "dpo": {"learning_rate": 1e-5},
    "grpo": {"learning_rate": 1e-5},
}

__all__ = ["DEFAULTS", "LORA_DEFAULTS", "STAGE_DEFAULTS"]
