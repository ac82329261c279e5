"""`chatglm train` on a Ray cluster: Ray starts the processes, on any machines, as a launcher would.

    pip install "ray[train]"
    python examples/ray_train.py FOLDER

FOLDER is the model. What is here a few steps on four rows is any stage with any keys: `train` takes
the words behind `chatglm train`. Each worker is a process of one run, as torchrun's are: Ray sets
the same variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and opens the process
group, and accelerate finds both. Data, model and output are folders that all machines see.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.train import Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

ROWS = [("你好", "你好！"), ("hello", "Hello!"), ("再见", "再见！"), ("bye", "Goodbye!")]


def run_stage(config: dict[str, Any]) -> None:
    """Run a stage in one worker; Ray calls it in all of them.

    Args:
        config: `words`, those behind `chatglm train`.
    """
    from chatglm.training.command import make_parser

    args = make_parser().parse_args(config["words"])
    args.run(args)


def train(words: list[str], num_workers: int, storage: Path, use_gpu: bool = False) -> Result:
    """Run a stage by some workers and wait for its end.

    Args:
        words: those behind `chatglm train`; folders with whole paths, since workers run elsewhere.
        num_workers: processes; with `use_gpu` each has a GPU of its own.
        storage: a folder of Ray's own notes, which all machines see.
        use_gpu: False for CPUs, where processes speak by gloo.
    """
    trainer = TorchTrainer(
        run_stage,
        train_loop_config={"words": words},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=RunConfig(name="chatglm", storage_path=str(storage)),
    )
    return trainer.fit()


def main(folder: str) -> Path:
    """Fine-tune a model by two workers on this machine; return the output folder."""
    work = Path(tempfile.mkdtemp())
    rows = [json.dumps({"prompt": prompt, "response": answer}) for prompt, answer in ROWS]
    (work / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    keys = {
        "train_data": work / "rows.jsonl",
        "output": work / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
    }
    flags = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        train(["sft", str(Path(folder).resolve()), *flags, "--disable_tqdm"], 2, work / "ray")
    finally:
        ray.shutdown()
    return work / "out"


if __name__ == "__main__":
    print(main(sys.argv[1]))
