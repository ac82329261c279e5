"""What the processes of `test_distributed` run, started by torchrun or by accelerate's launcher.

    distributed_worker.py die STEP KEY...     as `chatglm train sft KEY...`; process 1 dies there
    distributed_worker.py refuse FILE KEY...  the same, refused; FILE.N gets why by process N
    distributed_worker.py zero KEY...         as `chatglm train sft KEY...`, under DeepSpeed
    distributed_worker.py train STAGE KEY...  as `chatglm train STAGE KEY...`
    distributed_worker.py cut CONFIG KEY...   the same for sft, by FSDP2 as accelerate's file says
    distributed_worker.py forget FOLDER STEP  all but a step's checkpoint moves to FOLDER.first
    distributed_worker.py fsdp2 MODEL FILE    FSDP2 beside one process; FILE gets what was found

Several of them may follow one another, with `then` between them.
"""

import dataclasses
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.commands import launch
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, TrainerCallback

from chatglm.training.command import make_parser
from chatglm.training.models import save_trained
from chatglm.training.processes import leave
from chatglm.training.settings import Settings
from chatglm.training.stages import sft

STAGE = sft.STAGE
STEPS = 5
RATE = 1e-4  # a larger one makes more of the last digits of small gradients


class Death(TrainerCallback):
    """Ends process 1 as a kill -9 does, with nothing put away.

    Args:
        step: after which it dies.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and PartialState().process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def die(step: str, *words: str) -> None:
    """Train until a step and die."""
    build = sft.STAGE.build_trainer

    def build_mortal(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trainer.add_callback(Death(int(step)))
        return trainer

    sft.STAGE = dataclasses.replace(sft.STAGE, build_trainer=build_mortal)
    args = make_parser().parse_args(["sft", *words])
    args.run(args)


def zero(*words: str) -> None:
    """Train under DeepSpeed, whose communication the trainer opens on GPUs only."""
    importlib.import_module("deepspeed").init_distributed(dist_backend="gloo")
    args = make_parser().parse_args(["sft", *words])
    args.run(args)


def train_stage(*words: str) -> None:
    """Train a stage."""
    args = make_parser().parse_args(words)
    args.run(args)


def cut(config: str, *words: str) -> None:
    """Train by FSDP2 through accelerate and the Trainer, which on CPUs would take DDP.

    All that is other than on GPUs is the name of the way: accelerate asks whether there are several
    GPUs, and not whether the parts can be sent around.
    """
    os.environ.update(read_fsdp_variables(config))
    build = AcceleratorState.__init__

    def build_cut(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        build(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = build_cut
    sft.STAGE = dataclasses.replace(STAGE, build_trainer=build_watched)
    train_stage("sft", *words)


def read_fsdp_variables(config: str) -> dict[str, str]:
    """Return what accelerate's launcher hands to its processes for a file."""
    words = ["--config_file", config, "--main_process_port", "0", "script.py"]
    args = launch.launch_command_parser().parse_args(words)
    args, _, _ = launch._validate_launch_command(args)
    found = prepare_multi_gpu_env(args)
    return {n: v for n, v in found.items() if n.startswith(("FSDP_", "ACCELERATE_"))}


def build_watched(*arguments: Any) -> Any:
    """Return the trainer of a stage, which must have the weights in parts at its first step."""
    trainer = STAGE.build_trainer(*arguments)
    trainer.add_callback(PartsOnly())
    return trainer


class PartsOnly(TrainerCallback):
    """Holds that every weight is a part when a step begins."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kinds = {type(parameter).__name__ for parameter in kwargs["model"].parameters()}
        assert kinds == {"DTensor"}, kinds


def forget(folder: str, step: str) -> None:
    """Leave what a run had when it was killed behind a checkpoint."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        place = Path(folder)
        first = place.with_name(f"{place.name}.first")
        place.rename(first)
        place.mkdir()
        for name in ("settings.yaml", f"checkpoint-{step}"):
            (first / name).rename(place / name)
    state.wait_for_everyone()


def refuse(file: str, *words: str) -> None:
    """Train where it is not possible, and write down the reason."""
    args = make_parser().parse_args(["sft", *words])
    try:
        args.run(args)
    except ValueError as error:
        Path(f"{file}.{PartialState().process_index}").write_text(str(error))


def draw_rows() -> dict[str, Tensor]:
    """Return four rows of the small vocabulary with as many answer tokens each."""
    ids = torch.randint(10, 7800, (4, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 11] = 7852  # <sop>
    labels = ids.clone()
    labels[:, :12] = -100
    return {"input_ids": ids, "labels": labels}


def train(model: Any, rows: dict[str, Tensor]) -> list[float]:
    """Take a few steps and return the losses."""
    optimizer = AdamW(model.parameters(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(**rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()


def fsdp2(folder: str, file: str) -> None:
    """Train with every block cut into parts, save, and compare with the whole model."""
    state = PartialState(cpu=True)
    rows, whole, cut = draw_rows(), load(folder), load(folder)
    for block in cut.transformer.layers:
        fully_shard(block)
    fully_shard(cut)
    part = {name: tensor[state.process_index :: 2] for name, tensor in rows.items()}
    expected, own = train(whole, rows), torch.tensor(train(cut, part))
    torch.distributed.all_reduce(own)  # each has the mean of its half of the answers
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(cut, options=full)
    if not state.is_main_process:
        return
    saved = Path(file).with_name("saved")
    save_trained(cut, Settings(model=folder), saved, weights)
    differences = [(weights[name] - t).abs().max() for name, t in whole.state_dict().items()]
    report = {
        "processes": state.num_processes,
        "parts": type(cut.transformer.layers[0].mlp.dense_h_to_4h.weight).__name__,
        "losses": (own / 2).tolist(),
        "expected": expected,
        "difference": max(differences).item(),
        "saved": str(saved),
    }
    Path(file).write_text(json.dumps(report))


COMMANDS = {
    "die": die,
    "refuse": refuse,
    "zero": zero,
    "train": train_stage,
    "cut": cut,
    "forget": forget,
    "fsdp2": fsdp2,
}

if __name__ == "__main__":
    PartialState(cpu=True)
    todo: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "then":
            todo.append([])
        else:
            todo[-1].append(word)
    for name, *words in todo:
        COMMANDS[name](*words)
    leave(0)
