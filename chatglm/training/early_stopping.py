"""Owns when a training ends before its last step, and which of its checkpoints becomes the result.

Both follow from one figure of the held-out rows. How long it has not become better is counted from
the log, which every checkpoint has, so a run that goes on has lost nothing of its patience. Does
not know how figures are computed.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from transformers import TrainerCallback

from chatglm.training.settings import KeyProblem, Settings

BEST, PATIENCE = "load_best_model_at_end", "early_stopping_patience"
METRIC = "metric_for_best_model"
HELD_OUT = "eval_"
# Of these figures the smaller one is the better; transformers says so of losses alone.
FALLING = ("*loss", "perplexity", "kl", "*clipped_ratio")
STEP_KEYS = ("eval_steps", "save_steps")


def plan_best(settings: Settings, given: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Complete the library's keys so that the best model can be known, kept and written.

    Args:
        settings: ours.
        given: the keys that a user set.
        values: all keys of the run, which are changed.

    Raises:
        KeyProblem: for keys that do not go together, naming the remedy.
    """
    asking = PATIENCE if settings.early_stopping_patience else BEST
    if asking == BEST and not values.get(BEST):
        if METRIC not in given:
            values.pop(METRIC, None)
        return
    if not settings.held_out_data:
        raise KeyProblem(
            f"{asking} looks at held-out rows: set eval_data or val_ratio, or leave it out"
        )
    values.setdefault(BEST, True)
    metric = str(values.get(METRIC) or "loss").removeprefix(HELD_OUT)
    values[METRIC] = metric
    is_falling = any(fnmatch(metric, pattern) for pattern in FALLING)
    if values.get("greater_is_better") is None:
        values["greater_is_better"] = not is_falling
    if values.get("eval_strategy") in ("no", False):
        raise KeyProblem(f"{asking} needs evaluations: leave eval_strategy out, or say steps")
    if values[BEST]:
        _align_checkpoints(asking, given, values)


def _align_checkpoints(asking: str, given: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Have a checkpoint with every evaluation, since the best model is one of those."""
    how = values.get("eval_strategy", "steps")
    saved = values.setdefault("save_strategy", how)
    if saved not in (how, "best"):
        raise KeyProblem(
            f"{asking} keeps the best checkpoint, and save_strategy={saved} writes none with the "
            f"evaluations of eval_strategy={how}: make them the same, or set {BEST} to false"
        )
    if saved != "steps":
        return
    known = [given[key] for key in STEP_KEYS if key in given]
    if len(set(known)) > 1:
        raise KeyProblem(
            f"{asking} keeps the best checkpoint, and with eval_steps={known[0]} and save_steps="
            f"{known[1]} not every evaluation has one: make them the same, or set {BEST} to false"
        )
    values |= dict.fromkeys(STEP_KEYS, known[0] if known else values["eval_steps"])


def check_metric(arguments: Any, figures: Sequence[str]) -> None:
    """Refuse a figure that a stage does not have, which would be missed at its first evaluation.

    Args:
        arguments: the library's.
        figures: patterns of the names of a stage's figures of held-out rows.

    Raises:
        KeyProblem: naming those that there are.
    """
    metric = str(arguments.metric_for_best_model or "").removeprefix(HELD_OUT)
    if metric and not any(fnmatch(metric, pattern) for pattern in figures):
        raise KeyProblem(
            f"{METRIC} is {metric}, and the figures of this stage's held-out rows are "
            f"{', '.join(figures)}"
        )


def count_stale(
    history: Sequence[Mapping[str, Any]], metric: str, is_rising: bool, threshold: float
) -> int:
    """Return how many evaluations have passed since one was better than all before it.

    Args:
        history: lines of a log.
        metric: the figure, with or without `eval_`.
        is_rising: whether more is better.
        threshold: what better means at least; every gain counts for what is the best so far.
    """
    key = HELD_OUT + metric.removeprefix(HELD_OUT)
    best, stale = None, 0
    for value in (float(line[key]) for line in history if key in line):
        gain = None if best is None else (value - best if is_rising else best - value)
        stale = 0 if gain is None or (gain > 0 and gain > threshold) else stale + 1
        best = value if gain is None or gain > 0 else best
    return stale


class EarlyStop(TrainerCallback):
    """Ends a training whose held-out figure has not become better for some evaluations.

    Args:
        settings: with `early_stopping_patience`, 0 for none, and `early_stopping_threshold`.
    """

    def __init__(self, settings: Settings) -> None:
        self.patience = settings.early_stopping_patience
        self.threshold = settings.early_stopping_threshold

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what there is to evaluate.

        Raises:
            KeyProblem: if the run is over before its first evaluation.
        """
        if args.eval_strategy == "steps" and state.eval_steps > state.max_steps:
            raise KeyProblem(
                f"the run has {state.max_steps} steps and is evaluated every {state.eval_steps}: "
                f"lower eval_steps, or leave {PATIENCE} and {BEST} out"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so if the patience is at its end."""
        rising, name = bool(args.greater_is_better), args.metric_for_best_model
        stale = count_stale(state.log_history, name, rising, self.threshold)
        if self.patience and stale >= self.patience:
            control.should_training_stop = control.should_save = True


__all__ = ["EarlyStop", "check_metric", "count_stale", "plan_best"]
