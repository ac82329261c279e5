"""Owns the report on a training that is planned: what it takes, printed before anything is loaded.

    python -m chatglm.training.planning ../chatglm-6b --config configs/stages/sft_lora.yaml
    python -m chatglm.training.planning ../chatglm-6b --bf16 --gpus 8 --sharding zero3

Reads a model's config.json, a stage's YAML file and a DeepSpeed file, and nothing else. Does not
know how bytes and operations follow from them (`memory`).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from chatglm.cli import CommandParser, run_command
from chatglm.loading import default_model_folder
from chatglm.training.estimate.memory import (
    OPTIMIZER_BYTES,
    OPTIMIZER_STATES,
    SHARDINGS,
    Job,
    Shape,
    count_trained,
    count_work,
    plan_memory,
)
from chatglm.training.keys.translating import rename
from chatglm.training.layers import expand_modules, expand_targets, split_names
from chatglm.training.settings import KeyProblem, coerce, read_config, read_flags, require

ENGINE_SIZES = {
    "live_weights": "stage3_max_live_parameters",
    "bucket_weights": "allgather_bucket_size",
}
CUDA_REMARK = "CUDA itself and gaps between tensors take 1 to 2 GB more"


def read_shape(folder: Path) -> Shape:
    """Read the sizes of a model from its config.json.

    Raises:
        ValueError: if it is not there or lacks one.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    sizes = ("vocab_size", "hidden_size", "inner_hidden_size", "num_layers", "num_attention_heads")
    missing = [key for key in (*sizes, "max_sequence_length") if key not in config]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it is not of a ChatGLM model")
    return Shape(
        **{key: config[key] for key in sizes},
        window=config["max_sequence_length"],
        is_tied=config.get("tie_word_embeddings", True),
        bits=config.get("quantization_bit", 0),
        group_size=config.get("quantization_group_size") or 0,
        packs_embeddings=config.get("quantization_embeddings", False),
    )


def read_job(keys: Mapping[str, Any], shape: Shape) -> Job:
    """Return what a stage's keys, and ours beside them, say about memory.

    Args:
        keys: of a stage's file and the command line; those that do not matter here are ignored.
        shape: of the model, whose window and packed weights are the default.

    Raises:
        KeyProblem: for a value that a key cannot have, or a combination that does not train.
    """
    hints = get_type_hints(Job)
    fields = {key: coerce(key, value, hints[key]) for key, value in keys.items() if key in hints}
    if keys.get("deepspeed"):
        fields = {**read_engine(keys["deepspeed"]), **fields}
    job = Job(**fields)
    packing = {"bits": job.bits or shape.bits, "group_size": job.group_size or shape.group_size}
    job = dataclasses.replace(job, max_length=job.max_length or shape.window, **packing)
    _check(job, shape)
    return job


def _check(job: Job, shape: Shape) -> None:
    require(job.sharding in SHARDINGS, "sharding", job.sharding, " or ".join(SHARDINGS))
    require(job.gpus > 0, "gpus", job.gpus, "1 or more")
    known = [*OPTIMIZER_STATES, *OPTIMIZER_BYTES]
    require(job.optim in known, "optim", job.optim, " or ".join(known))
    expand_modules(job.modules_to_save, expand_targets(job.lora_targets), job.bits)
    if job.bits and job.trains_all:
        raise KeyProblem(f"bits={job.bits} cannot be trained: set lora_rank or pre_seq_len")
    if job.bits and job.sharding in ("zero3", "fsdp2"):
        raise KeyProblem(
            f"packed weights are not cut into parts by {job.sharding}: use ddp or zero2, as every "
            "GPU has room for them"
        )


def read_engine(file: Any) -> dict[str, Any]:
    """Return what a DeepSpeed file says: how the parts are cut, and what the host keeps.

    Args:
        file: path of it, or its content.
    """
    content = file if isinstance(file, dict) else json.loads(Path(file).read_text(encoding="utf-8"))
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    found: dict[str, Any] = {"sharding": f"zero{stage}" if stage in (2, 3) else "ddp"}
    parts = ("optimizer", "param")
    found["offload"] = [p for p in parts if zero.get(f"offload_{p}", {}).get("device") == "cpu"]
    for ours, theirs in ENGINE_SIZES.items():
        if isinstance(zero.get(theirs), int | float):
            found[ours] = int(zero[theirs])
    return found


def format_plan(name: str, shape: Shape, job: Job) -> str:
    """Return the plan as lines for people."""
    memory, trained = plan_memory(shape, job), count_trained(shape, job)
    rows, length = job.per_device_train_batch_size, job.max_length
    gpus = f"{job.gpus} GPUs, {job.sharding}" if job.gpus > 1 else "one GPU"
    gpus += ", gradient checkpointing" if job.gradient_checkpointing else ""
    lines = [
        f"{name}: {shape.parameters / 1e9:.3f} billion parameters, {trained / 1e6:,.2f} million "
        f"trained ({describe_method(job)})",
        f"{rows} x {length} tokens at a time on {gpus}",
        "",
        "GB on each GPU",
    ]
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "casts", "buffers"):
        lines.append(f"  {part:<12}{getattr(memory, part) / 1e9:9.2f}")
    lines.append(f"  {'at most':<12}{memory.peak / 1e9:9.2f}   at once; {CUDA_REMARK}")
    if memory.host:
        lines.append(f"  {'host':<12}{memory.host / 1e9:9.2f}   in the computer's memory, per GPU")
    return "\n".join(lines) + "\n"


def describe_method(job: Job) -> str:
    """Return how a job trains, in words."""
    packed = f" over {job.bits}-bit weights" if job.bits else ""
    if job.lora_rank:
        beside = split_names(job.modules_to_save)
        whole = f" and {', '.join(beside)} whole" if beside else ""
        return f"{'DoRA' if job.use_dora else 'LoRA'} of rank {job.lora_rank}{packed}{whole}"
    return f"prefix of {job.pre_seq_len}{packed}" if job.pre_seq_len else "all"


def format_time(shape: Shape, job: Job, tflops: float, tokens: float) -> str:
    """Return the work as lines for people.

    Args:
        shape: of the model.
        job: the training.
        tflops: 10**12 operations a second that a GPU keeps up.
        tokens: of all epochs, pads included.
    """
    work = count_work(shape, job)
    text = f"\n{work.total / 1e9:.1f} GFLOP a token"
    if not tflops:
        return f"{text}; --tflops says how long that takes\n"
    seconds = work.total / (tflops * 1e12)
    text += f": {1e6 * seconds:.4g} microseconds at {tflops:g} TFLOP/s, {1 / seconds:,.0f} tokens/s"
    text += " on each GPU" if job.gpus > 1 else ""
    if tokens:
        text += f", {tokens * seconds / job.gpus / 3600:.2f} hours for {tokens:,.0f} tokens"
    return text + "\n"


def make_parser() -> argparse.ArgumentParser:
    """The options; whatever else is given is a key of a stage."""
    prog = "python -m chatglm.training.planning"
    parser = CommandParser(prog=prog, description="Memory and time of a training, before it runs.")
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="folder with a config.json (this repository)")
    add("--config", metavar="FILE", help="a stage's YAML file; --KEY VALUE go before it")
    add("--tflops", type=float, default=0.0, metavar="F", help="10**12 operations a second a GPU")
    add("--tokens", type=float, default=0.0, metavar="N", help="of the whole training")
    add("--json", action="store_true", help="print one JSON document")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of a training.

    Args:
        argv: the words of the command line; those of the process if None.
    """
    args, words = make_parser().parse_known_args(argv)
    return run_command(lambda _: print_plan(args, words), args)


def print_plan(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Print the plan that parsed options and a stage's keys ask for.

    Raises:
        ValueError: for a folder, a file or a key that cannot be used.
    """
    flags = rename(read_flags(words))
    unknown = sorted(flags.keys() - get_type_hints(Job).keys() - {"deepspeed"})
    if unknown:
        known = ", ".join(get_type_hints(Job))
        raise KeyProblem(f"{unknown[0]} does not matter for memory; the keys that do are {known}")
    folder = Path(args.model or default_model_folder())
    shape = read_shape(folder)
    keys = rename(read_config(Path(args.config)) if args.config else {}) | flags
    job = read_job(keys, shape)
    if args.json:
        memory, work = plan_memory(shape, job)._asdict(), count_work(shape, job)._asdict()
        report = {"parameters": shape.parameters, "trained": count_trained(shape, job)}
        report |= {"bytes": memory, "operations": work, "job": dataclasses.asdict(job)}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(format_plan(str(folder), shape, job))
        sys.stdout.write(format_time(shape, job, args.tflops, args.tokens))
    return 0


__all__ = ["format_plan", "format_time", "read_engine", "read_job", "read_shape"]
