"""Owns what transformers' Trainer does about its checkpoints: seals, counts and goes on from them.

Does not know what makes a checkpoint whole (`checkpoints`) nor who may go on (`resuming`).
"""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from chatglm.training.checkpoints import list_whole, read_state, rotate, seal, tell
from chatglm.training.settings import KeyProblem


class CheckpointCallback(TrainerCallback):
    """Seals each checkpoint and deletes what is too many; corrects where a run goes on.

    Args:
        folder: of the run.
        limit: how many whole checkpoints to keep; None or 0 for all.
        begun: the checkpoint that the run goes on from, if any.
    """

    def __init__(self, folder: Path, limit: int | None, begun: Path | None) -> None:
        self.folder, self.limit, self.begun = folder, limit, begun
        self.is_done = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal what was just written, by all processes, and delete what is too many now."""
        PartialState().wait_for_everyone()
        if not args.should_save:
            return
        seal(self.folder / f"checkpoint-{state.global_step}")
        best = state.best_model_checkpoint
        rotate(self.folder, self.limit, [Path(best)] if best else [])

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Correct what a checkpoint says of another place or length of the run.

        Raises:
            KeyProblem: if the run is to be shorter than what is done.
        """
        if self.begun is None:
            return
        self._find_best(state)
        check_length(self.begun, state.global_step, state.max_steps)
        self.is_done = state.global_step == state.max_steps
        control.should_training_stop = self.is_done
        before = read_state(self.begun).get("max_steps", 0)
        if before not in (0, state.max_steps) and not self.is_done:
            follow_schedule(optimizer, lr_scheduler, before, state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write and evaluate nothing a second time where no step was left."""
        if self.is_done:
            control.should_save = control.should_evaluate = control.should_log = False

    def _find_best(self, state: Any) -> None:
        """Look for the best checkpoint where the run is now, and forget one that is gone."""
        if state.best_global_step is None:
            return
        best = self.folder / f"checkpoint-{state.best_global_step}"
        if best in list_whole(self.folder):
            state.best_model_checkpoint = str(best)
            return
        tell(f"{best}, the best so far, is not there any more: the best of what follows counts")
        state.best_model_checkpoint = state.best_metric = state.best_global_step = None


def check_length(checkpoint: Path, done: int, max_steps: int) -> None:
    """Refuse a run that is to be shorter than what is done.

    Raises:
        KeyProblem: naming both.
    """
    if done > max_steps:
        raise KeyProblem(
            f"{checkpoint} has done {done} steps, and the whole run is to be {max_steps} now: set "
            "max_steps or num_train_epochs to as many or more, or begin in another folder"
        )


def follow_schedule(optimizer: Any, scheduler: Any, before: int, state: Any) -> None:
    """Set the learning rate to where the schedule of a run of another length is, and say so.

    What a checkpoint holds is the rate of the old length's schedule, often 0 at its end.

    Args:
        optimizer, scheduler: of the run.
        before: steps that the whole run was to have.
        state: `global_step` done and `max_steps` of the whole run now.
    """
    old = optimizer.param_groups[0]["lr"]
    if hasattr(scheduler, "lr_lambdas"):  # others follow the loss, or belong to DeepSpeed
        scheduler.last_epoch -= 1
        scheduler.step()
    new = optimizer.param_groups[0]["lr"]
    tell(
        f"the whole run is {state.max_steps} steps now and was to be {before}: the learning rate "
        f"goes on as in a run of {state.max_steps} steps ({new:.3g} after step "
        f"{state.global_step}, and {old:.3g} in one of {before})"
    )


__all__ = ["CheckpointCallback", "check_length", "follow_schedule"]
