"""Owns `chatglm bench --train`: what a training step of a model folder takes on this machine.

    chatglm bench --train full --length 256 --batch 4
    chatglm bench ../chatglm-6b --train qlora --bits 4 --length 512

A step is what `chatglm train sft` does for a batch: forward pass, backward pass, gradients clipped,
AdamW. Rows are random, without padding, half of each an answer that is learned. Does not know how a
folder becomes a model that is trained (`chatglm.training.models`).

Shapes: `B` rows, `S` tokens of a row.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chatglm.benching.measuring import list_versions, read_device_peak
from chatglm.cli import choose_folder
from chatglm.training.data.batches import find_learned
from chatglm.training.data.rendering import IGNORED_LABEL

# The adapters have this rank, at the joint projection of queries, keys and values.
RANK = 8
LEARNING_RATE = 1e-4
# Gradients are clipped to this norm.
LARGEST_NORM = 1.0
# So many steps are taken; the first one, which makes the optimizer's states, is not counted.
STEPS = 6
# A row has as many tokens at least: one of a question, two markers, and one that is learned.
SHORTEST = 4


@dataclass
class TrainingReport:
    """What was measured.

    Attributes:
        model: the folder.
        train: "full", "lora" or "qlora".
        bits: of packed weights; 0 for plain ones.
        device, dtype, threads: what it computed on and in.
        length, batch_size: of the rows.
        parameters, trained: numbers in the model, and how many of them are trained.
        load_seconds: of loading.
        step_seconds: of a step, the middle of all but the first.
        peak_bytes: the most memory that was in use on the device, or by the process on a CPU; 0
            where the system does not tell.
        versions: of what it ran on.
    """

    model: str
    train: str
    bits: int
    device: str
    dtype: str
    threads: int
    length: int
    batch_size: int
    parameters: int
    trained: int
    load_seconds: float
    step_seconds: float
    peak_bytes: int
    versions: dict[str, str]

    @property
    def figures(self) -> dict[str, float]:
        """What follows from the seconds."""
        return {"tokens_per_second": self.batch_size * self.length / self.step_seconds}


class TrainingStep:
    """A model, its optimizer and a batch, ready to be trained on again and again.

    Args:
        model: that gives a `loss`; what of it requires a gradient is trained.
        batch: its inputs.
        compute_dtype: that products are computed in by autocast; None for that of the weights.
    """

    def __init__(
        self, model: nn.Module, batch: Mapping[str, Any], compute_dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.batch, self.compute_dtype = model.train(), batch, compute_dtype
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = self.trained[0].device
        is_fused = self.device.type in ("cpu", "cuda")
        self.optimizer: Any = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, fused=is_fused)

    def run(self) -> float:
        """Take a step and return its seconds.

        Raises:
            ValueError: if the loss is no number, since such a step measures nothing.
        """
        began = time.perf_counter()
        is_cast = self.compute_dtype is not None
        with torch.autocast(
            self.device.type, self.compute_dtype or torch.bfloat16, enabled=is_cast
        ):
            loss: Tensor = self.model(**self.batch).loss
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        nn.utils.clip_grad_norm_(self.trained, LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        _wait_for(self.device)
        seconds = time.perf_counter() - began
        if not bool(loss.isfinite()):
            raise ValueError(f"the loss was {loss.item()}: the weights cannot be trained")
        return seconds


def _wait_for(device: torch.device) -> None:
    """Let what was asked of a GPU be done."""
    waits: dict[str, Callable[[], None]] = {
        "cuda": torch.cuda.synchronize,
        "mps": torch.mps.synchronize,
    }
    if device.type in waits:
        waits[device.type]()


def draw_rows(config: Any, length: int, batch_size: int, device: torch.device) -> dict[str, Tensor]:
    """Return random rows: `input_ids` and `labels` `(B, S)`, the second half an answer.

    Args:
        config: of the model, with its special tokens.
        length: S.
        batch_size: B.
        device: where they are put.

    Raises:
        ValueError: for a length without room for a question and an answer.
    """
    if length < SHORTEST:
        raise ValueError(f"a row has {SHORTEST} tokens or more, got {length}")
    last = min(config.gmask_token_id, config.mask_token_id)
    generator = torch.Generator().manual_seed(length)
    input_ids = torch.randint(SHORTEST, last, (batch_size, length), generator=generator)
    border = max(3, length // 2)
    input_ids[:, border - 2] = config.gmask_token_id
    input_ids[:, border - 1] = config.bos_token_id
    input_ids[:, -1] = config.eos_token_id
    labels = input_ids.clone()
    labels[:, :border] = IGNORED_LABEL
    return {"input_ids": input_ids.to(device), "labels": labels.to(device)}


def measure(args: argparse.Namespace) -> TrainingReport:
    """Load the model of the options and measure its training steps.

    Args:
        args: what `chatglm.benching.command` parsed.

    Raises:
        ValueError: if the model cannot be loaded or trained so.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    began = time.perf_counter()
    model, compute_dtype = load(args)
    load_seconds = time.perf_counter() - began
    rows = draw_rows(model.config, args.length, args.batch, model.device)
    rows["logits_to_keep"] = find_learned(rows["labels"])
    step = TrainingStep(model, {**rows, "use_cache": False}, compute_dtype)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    seconds = [step.run() for _ in range(STEPS)][1:]
    return TrainingReport(
        model=model.config.name_or_path,
        train=args.train,
        bits=model.config.quantization_bit,
        device=str(model.device),
        dtype=str(compute_dtype or model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        length=args.length,
        batch_size=args.batch,
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in step.trained),
        load_seconds=load_seconds,
        step_seconds=statistics.median(seconds),
        peak_bytes=read_device_peak(model.device),
        versions=list_versions(),
    )


def load(args: argparse.Namespace) -> tuple[Any, torch.dtype | None]:
    """Return the model on its device as `chatglm train sft` has it, and the dtype to compute in.

    Raises:
        ValueError: for options that do not go together, or a folder that is not whole.
    """
    from chatglm.loading import choose_device
    from chatglm.training.models import load_policy
    from chatglm.training.settings import Settings

    device = choose_device(args.device)
    compute_dtype = choose_compute_dtype(args.dtype, device)
    if args.bits and args.train != "qlora":
        raise ValueError(f"--bits {args.bits} goes with --train qlora, got --train {args.train}")
    settings = Settings(
        model=choose_folder(args.folder, args.model) or "",
        bits=(args.bits or 4) if args.train == "qlora" else 0,
        lora_rank=0 if args.train == "full" else RANK,
    )
    model: Any = load_policy(settings, compute_dtype, device_map={"": device})
    if model.config.quantization_bit and args.train != "qlora":
        raise ValueError(
            f"the weights are packed to {model.config.quantization_bit} bits and cannot be trained "
            "themselves: measure --train qlora, or name a folder with plain weights"
        )
    return model, compute_dtype


def choose_compute_dtype(dtype: str | None, device: torch.device) -> torch.dtype | None:
    """Return the dtype to compute in: bfloat16 on a GPU unless told otherwise, or None.

    Raises:
        ValueError: for a format that training does not compute in.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else None
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--train computes in float32 or bfloat16, got {dtype}")
    return torch.bfloat16 if dtype == "bfloat16" else None


def format_report(report: TrainingReport) -> str:
    """The report as lines for people."""
    packed = f" over {report.bits} bits" if report.bits else ""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    place = f"{report.device}, {report.dtype}, threads: {report.threads}"
    peak = f", peak memory {report.peak_bytes / 1e9:.2f} GB" if report.peak_bytes else ""
    speed = report.figures["tokens_per_second"]
    return (
        f"{report.model} (training: {report.train}{packed}; {place})\n"
        f"load     {report.load_seconds:.2f} s\n"
        f"trained  {report.trained:,} of {report.parameters:,} numbers\n"
        f"step     {1000 * report.step_seconds:.1f} ms, {speed:.1f} tokens/s "
        f"({report.batch_size} x {report.length} tokens){peak}\n"
        f"{versions}\n"
    )
