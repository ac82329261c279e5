"""Owns what a process knows of others that a launcher started beside it: are there any, which of
the GPUs that it sees are its own, and how it ends. Does not know what is trained.
"""

import logging
import os
import sys
from typing import Any, NoReturn

FSDP_SWITCH = "ACCELERATE_USE_FSDP"  # accelerate's launcher says so by it
LAUNCH = "torchrun --nproc_per_node {count} -m chatglm.training.command STAGE ..."


def count_processes() -> int:
    """Return how many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_one_process(stage: str) -> None:
    """Refuse to do the same work once in each of several processes.

    Args:
        stage: that knows nothing of others.

    Raises:
        ValueError: naming how many there are.
    """
    count = count_processes()
    if count > 1:
        raise ValueError(
            f"{stage} runs in one process, and a launcher started {count} (WORLD_SIZE): call it "
            "without the launcher; device names the GPU"
        )


def keep_to_one_gpu(arguments: Any) -> None:
    """Keep a library's trainer from spreading over all GPUs that a process without launcher sees.

    transformers wraps a model in torch's DataParallel then. That cuts what a model is given along
    its first dimension and gathers what it returns likewise: a batch's count of learned tokens, the
    places of its logits and the logits of each part do not come through that as they were.

    Args:
        arguments: `transformers.TrainingArguments`; from here on they are of one GPU.
    """
    if arguments.n_gpu > 1:
        tell_of_gpus(arguments.n_gpu, str(arguments.device))
        arguments._n_gpu = 1


def tell_of_gpus(count: int, device: str) -> None:
    """Say on standard error that one GPU of several is used, and how to use all."""
    sys.stderr.write(
        f"chatglm: {count} GPUs are seen and {device} alone is used, since no launcher started "
        f"this process. For all of them: {LAUNCH.format(count=count)}\n"
    )


def check_parts(trainer: Any) -> None:
    """Refuse whole copies of a model where FSDP was asked for, which accelerate takes on CPUs.

    Args:
        trainer: of transformers or trl.

    Raises:
        ValueError: naming the remedy.
    """
    is_asked = os.environ.get(FSDP_SWITCH, "false").lower() == "true" or bool(trainer.args.fsdp)
    count = trainer.args.world_size
    if is_asked and count > 1 and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"FSDP is asked for, and accelerate would train {count} whole copies of the model by "
            "DDP: FSDP needs GPUs here; on CPUs launch with configs/accelerate/ddp.yaml"
        )


def leave(code: int) -> NoReturn:
    """End this process with an exit code; one of several without the destructors of C++.

    What PyTorch keeps of a process group may abort a process that has done its work ("terminate
    called without an active exception", 1 of 15 runs of two processes on CPUs with torch 2.13, with
    `destroy_process_group` and without), and the launcher then calls the whole run failed.

    Args:
        code: 0 if all went well.
    """
    if count_processes() == 1:
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


__all__ = [
    "check_parts",
    "count_processes",
    "keep_to_one_gpu",
    "leave",
    "require_one_process",
    "tell_of_gpus",
]
