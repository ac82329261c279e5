"""Owns what all parts of a PPO run share: settings, processes, the step it is at, the seeds.

Does not know policies, answers or losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from torch import Tensor
from transformers import set_seed

from chatglm.answering import derive_seed
from chatglm.training.ppo.settings import PpoArguments, PpoSettings
from chatglm.training.precision import check_launcher, name_format
from chatglm.training.processes import tell_of_gpus
from chatglm.training.settings import KeyProblem, require
from chatglm.training.trainer import check_loss

# These ways to distribute, by accelerate's names, leave a whole model in each process.
WHOLE_MODELS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "MULTI_HPU", "MULTI_MLU")


@dataclass
class Run:
    """What the parts of a run share.

    Attributes:
        settings, arguments: of the run.
        accelerator: knows devices and processes.
        step: how many steps are done.
    """

    settings: PpoSettings
    arguments: PpoArguments
    accelerator: Accelerator
    step: int = 0

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.settings.output)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def mini_batch_size(self) -> int:
        """Answers of this process in an optimizer step."""
        arguments = self.arguments
        return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps

    @property
    def batch_size(self) -> int:
        """Answers of this process in a step."""
        return self.mini_batch_size * self.settings.num_mini_batches

    @property
    def batches_before(self) -> int:
        """How many batches, of all processes and steps, come before this process's in this step."""
        return self.step * self.accelerator.num_processes + self.accelerator.process_index

    def seed(self, number: int) -> None:
        """Begin a stretch of random numbers that only the seed, a number and the process decide."""
        place = (self.arguments.seed, number, self.accelerator.process_index)
        set_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def seed_answers(self, stretch: int, numbers: Sequence[int]) -> list[int]:
        """Return the seeds of answers, which only the run's seed and their numbers decide.

        Neither how many are answered at once nor by how many processes changes one.

        Args:
            stretch: which of the sequences of questions the numbers count.
            numbers: of the questions in it.
        """
        return [derive_seed(self.arguments.seed, stretch, number) for number in numbers]

    def total(self, values: Tensor) -> Tensor:
        """Add up over processes."""
        summed: Any = self.accelerator.reduce(values, reduction="sum")
        return summed

    def check(self, loss: Tensor) -> None:
        """Refuse to go on behind a loss, a gradient or a probability that is no number.

        Raises:
            ValueError: naming the step, the last good checkpoint and the remedy.
        """
        check_loss(loss, self.step, self.folder)


def build_accelerator(settings: PpoSettings, arguments: PpoArguments) -> Accelerator:
    """Return what knows devices, processes, number formats and where figures go.

    Raises:
        KeyProblem: for a tracker that is not installed, or a number format or a way to distribute
            that cannot be used.
    """
    installed = [str(name) for name in get_available_trackers()]
    for name in arguments.trackers:
        wanted = "none, or something that is installed"
        require(name in installed, "report_to", name, f"{wanted} ({', '.join(installed) or '-'})")
    check_launcher(vars(arguments))
    project = ProjectConfiguration(settings.output, str(Path(settings.output) / "runs"))
    try:
        accelerator = Accelerator(
            mixed_precision=name_format(vars(arguments)),
            cpu=arguments.use_cpu,
            log_with=[*arguments.trackers] or None,
            project_config=project,
        )
    except ValueError as error:
        raise KeyProblem(f"the configuration cannot be used: {error}") from error
    kind = accelerator.distributed_type.value
    require(kind in WHOLE_MODELS, "the distributed type", kind, "one with a whole model a process")
    if accelerator.num_processes == 1 and accelerator.device.type == "cuda":
        count = torch.cuda.device_count()
        if count > 1:
            tell_of_gpus(count, str(accelerator.device))
    return accelerator


__all__ = ["Run", "build_accelerator"]
