"""What the processes of `test_distributed` run, started by torchrun or by accelerate's launcher.

    distributed_worker.py die STEP KEY...     as `chatglm train sft KEY...`; process 1 dies there
    distributed_worker.py refuse FILE KEY...  the same, refused; FILE.N gets why by process N
    distributed_worker.py zero KEY...         as `chatglm train sft KEY...`, under DeepSpeed
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
from accelerate import PartialState
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


def refuse(file: str, *words: str) -> None:
    """Train where it is not possible, and write down the reason."""
    args = make_parser().parse_args(["sft", *words])
    try:
        args.run(args)
    except ValueError as error:
        Path(f"{file}.{PartialState().process_index}").write_text(str(error))


def draw_rows() -> dict[str, Tensor]:
    """Return four rows of the small vocabulary with as many answer tokens each."""
    ids = torch.randint(10, 8000, (4, 24), generator=torch.Generator().manual_seed(0))
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


if __name__ == "__main__":
    PartialState(cpu=True)
    todo: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "then":
            todo.append([])
        else:
            todo[-1].append(word)
    for name, *words in todo:
        {"die": die, "refuse": refuse, "zero": zero, "fsdp2": fsdp2}[name](*words)
    leave(0)
