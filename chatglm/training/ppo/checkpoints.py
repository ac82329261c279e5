"""Owns the checkpoints of PPO: whole or not there, whenever the run is killed.

    checkpoint-40/
        adapters, or the whole model with its code     as in the output folder
        value_head.safetensors
        optimizer.pt                                   optimizer, loss scale, learning rate
        trainer_state.json                             steps, KL coefficient, figures not yet logged
        manifest.json                                  what makes it whole (`checkpoints`)

There is no state of random numbers: every step begins from a seed of its own. Does not know what a
step does.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chatglm.checkpoints.durable import flush
from chatglm.training.adapters import find_below
from chatglm.training.checkpoints import PART, STATE_FILE, rotate, seal
from chatglm.training.models import find_base, load_policy, save_trained
from chatglm.training.ppo.value_head import ActorCritic, copy_trained
from chatglm.training.settings import Settings

OPTIMIZER_FILE = "optimizer.pt"


class RunState(NamedTuple):
    """The small things that a run goes on with.

    Attributes:
        global_step: steps that are done.
        kl_coefficient: as the last step left it.
        num_processes: that train together; another number would be other batches.
        pending: figures of steps that have no line in the log yet.
        max_steps: of the whole run, which the learning rate follows; 0 where it is not known.
    """

    global_step: int
    kl_coefficient: float
    num_processes: int
    pending: list[dict[str, float]]
    max_steps: int = 0


def write_checkpoint(
    output: Path,
    model: ActorCritic,
    settings: Settings,
    stateful: dict[str, Any],
    state: RunState,
    limit: int | None,
) -> None:
    """Write a checkpoint under another name, and rename it when all of it is on the disk.

    Args:
        output: folder of the run.
        model: the policy with its head.
        settings: of the run.
        stateful: what has a `state_dict`, by name.
        state: the small things.
        limit: how many checkpoints to keep; None or 0 for all.
    """
    name = f"checkpoint-{state.global_step}"
    part = output / f"{PART}{name}"
    shutil.rmtree(part, ignore_errors=True)
    save_trained(model.policy, settings, part)
    model.save_head(part)
    torch.save({key: item.state_dict() for key, item in stateful.items()}, part / OPTIMIZER_FILE)
    (part / STATE_FILE).write_text(json.dumps(state._asdict()), encoding="utf-8")
    seal(part)
    part.rename(output / name)
    flush(output)
    rotate(output, limit)


def read_state(checkpoint: Path, num_processes: int) -> RunState:
    """Return the small things of a checkpoint.

    Raises:
        ValueError: if another number of processes wrote it, or it is none of PPO's.
    """
    try:
        state = RunState(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(
            f"{checkpoint / STATE_FILE} is none that PPO has written ({error}): bring it back, or "
            f"move {checkpoint.name} away to go on from the one before"
        ) from error
    if state.num_processes != num_processes:
        raise ValueError(
            f"{checkpoint} was written by {state.num_processes} processes and {num_processes} are "
            "running now, which would be other batches: start as many as before"
        )
    return state


def read_optimizer(checkpoint: Path, stateful: dict[str, Any]) -> None:
    """Put everything with a `state_dict` back to where a checkpoint has it."""
    saved = torch.load(checkpoint / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    for key, item in stateful.items():
        item.load_state_dict(saved[key])


def load_policies(
    settings: Settings,
    compute_dtype: torch.dtype | None,
    checkpoint: Path | None,
    device: torch.device,
) -> tuple[Any, list[Tensor] | None]:
    """Return the policy to go on with, and what is trained of it as it was in the beginning.

    Args:
        settings: of the run.
        compute_dtype: bfloat16 or float16 if the training computes in it; None for float32.
        checkpoint: to go on from.
        device: where the copies of the beginning are to be.

    Returns:
        The policy, and copies, or None for new adapters, which say nothing in the beginning.
    """
    is_silent = settings.uses_lora and not settings.goes_on and settings.lora_bias == "none"
    policy = None
    beginning = None
    if checkpoint is None or not is_silent:
        policy = load_policy(settings, compute_dtype)
        beginning = None if is_silent else copy_trained(policy, device)
    if checkpoint is not None:
        policy = load_policy(_go_on_from(settings, checkpoint), compute_dtype)
        for config in getattr(policy, "peft_config", {}).values():
            # A checkpoint names the base where that was when it was written.
            config.base_model_name_or_path = str(find_base(settings))
    return policy, beginning


def _go_on_from(settings: Settings, checkpoint: Path) -> Settings:
    """Return the settings under which what is trained is that of a checkpoint."""
    if not settings.uses_lora:
        return replace(settings, model=str(checkpoint))
    adapters = [*find_below(settings), str(checkpoint)]
    return replace(settings, model=str(find_base(settings)), adapter=adapters, lora_rank=0)


__all__ = ["RunState", "load_policies", "read_optimizer", "read_state", "write_checkpoint"]
