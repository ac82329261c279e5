"""What loading the full-size checkpoint quantized takes in memory.

    python -m benchmarks.bench_memory [--layers N] [--bits 4 8] [--compare] [--dir DIR]

Makes a random checkpoint of the 6B model's sizes and shard layout (13.7 GB of float16 `.bin`
shards; `--layers` for fewer blocks) in a temporary folder, loads it on the CPU in a fresh process
per row, and throws it away. `--compare` also loads the old way: all of it in half, then `quantize`.

What counts: `peak` is VmHWM of the loading process, the most that was ever resident at once, Python
and torch included (`start` is what they take before the load). The pages of a memory-mapped shard
count in it from when they are read until they are given back; `anonymous` is the peak without them
(RssAnon, looked at every 5 ms, so a lower bound). `size` is the bytes of the loaded tensors,
`over` is `peak - size`. Without /proc (macOS) `peak` is the system's maximum resident set and the
others are null.

The last line is one JSON document.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from chatglm.model_files import find_model_files

ROOT = Path(__file__).resolve().parent.parent
PRESET = ROOT / "chatglm" / "presets" / "chatglm-6b"
INDEX = "pytorch_model.bin.index.json"
LIMIT = 10**9  # what a load may take beside its result, in bytes


def read_status(field: str) -> int | None:
    """Return a field of this process's status in bytes; None where the system has no such file."""
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            values = dict(line.split(":", 1) for line in status)
    except FileNotFoundError:
        return None
    return int(values[field].split()[0]) * 1024


def read_peak() -> int:
    """Return the most bytes that were resident at once so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return read_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class AnonymousPeak(threading.Thread):
    """Looks at this process's anonymous memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = read_status("RssAnon")
        self._stopped = threading.Event()

    def run(self) -> None:
        while self.bytes is not None and not self._stopped.wait(0.005):
            self.bytes = max(self.bytes, read_status("RssAnon") or 0)

    def stop(self) -> int | None:
        """Return the peak, in bytes."""
        self._stopped.set()
        self.join()
        return self.bytes


def measure_load(folder: Path, bits: int, old_way: bool) -> dict[str, Any]:
    """Load a folder in this process, and tell what it took."""
    row: dict[str, Any] = {"bits": bits, "way": "load, then quantize" if old_way else "at once"}
    row["start"] = read_peak()
    watch = AnonymousPeak()
    watch.start()
    began = time.perf_counter()
    options: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float16}
    if old_way:
        model = AutoModel.from_pretrained(folder, **options).quantize(bits)
    else:
        format_options = {"quant_method": "chatglm", "bits": bits}
        model = AutoModel.from_pretrained(folder, quantization_config=format_options, **options)
    row["seconds"] = round(time.perf_counter() - began, 1)
    row["anonymous"] = watch.stop()
    row["peak"] = read_peak()
    row["size"] = sum(tensor.nbytes for tensor in model.parameters())
    row["over"] = row["peak"] - row["size"]
    return row


def shrink_index(layers: int) -> dict[str, list[str]]:
    """Return the tensors of each shard of the 6B model, cut to so many blocks."""
    shards: dict[str, list[str]] = {}
    weight_map = json.loads((PRESET / INDEX).read_text(encoding="utf-8"))["weight_map"]
    for name, shard in weight_map.items():
        parts = name.split(".")
        if "layers" not in parts or int(parts[parts.index("layers") + 1]) < layers:
            shards.setdefault(shard, []).append(name)
    return shards


def prepare_folder(folder: Path, layers: int) -> None:
    """Put the model's code and a configuration of so many blocks into a folder."""
    for name in find_model_files(ROOT):
        shutil.copy(ROOT / name, folder)
    config = json.loads((PRESET / "config.json").read_text(encoding="utf-8"))
    config["num_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def read_sizes(folder: Path) -> dict[str, torch.Size]:
    """Return the sizes of the stored tensors, by name."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_disk(folder: Path, sizes: dict[str, torch.Size]) -> None:
    """Refuse to begin on a disk that the checkpoint would fill."""
    needed, free = sum(2 * size.numel() for size in sizes.values()), shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, and the checkpoint takes {needed / 1e9:.1f}: "
            "use fewer --layers, or name another disk with --dir"
        )


def make_tensor(name: str, size: torch.Size | None, generator: torch.Generator) -> torch.Tensor:
    """Return random half weights: a small block of them over and over, since only sizes count."""
    if size is None:  # the rotary buffers, which the model has no place for
        return torch.ones(32, dtype=torch.float16)
    block = torch.randn(2**20, generator=generator).mul_(0.02).half()
    tensor = torch.empty(size, dtype=torch.float16)
    for part in tensor.view(-1).split(block.numel()):
        part.copy_(block[: part.numel()])
    return tensor


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write a random checkpoint shard by shard, and return the bytes of its shards."""
    prepare_folder(folder, layers)
    sizes = read_sizes(folder)
    check_disk(folder, sizes)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    # The head repeats the embedding, as in the official shards; both come from the same seed.
    for shard, names in shrink_index(layers).items():
        tensors = {}
        for name in names:
            is_table = name.endswith(("word_embeddings.weight", "lm_head.weight"))
            source = torch.Generator().manual_seed(1) if is_table else generator
            tensors[name] = make_tensor(name, sizes.get(name), source)
            weight_map[name] = shard
        torch.save(tensors, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return sum(file.stat().st_size for file in folder.glob("*.bin"))


def measure_in_child(folder: Path, bits: int, old_way: bool) -> dict[str, Any]:
    """Measure one load in a process of its own."""
    way = ["--old-way"] if old_way else []
    command = [sys.executable, "-m", "benchmarks.bench_memory", "--load", str(folder), *way]
    child = subprocess.run(
        [*command, "--bits", str(bits)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(child.stdout.splitlines()[-1])


def print_row(row: dict[str, Any]) -> None:
    """Print one row for people."""
    figures = {name: row[name] for name in ("size", "start", "anonymous", "peak", "over")}
    text = ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in figures.items() if value)
    print(f"INT{row['bits']}, {row['way']}: {text}, {row['seconds']:.0f} s")


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Make the checkpoint, load it in every way asked for, and return the report."""
    # The loading processes measure themselves: what only the report needs stays out of them.
    from benchmarks.bench_formats import describe_machine

    with tempfile.TemporaryDirectory(prefix="chatglm-6b-random-", dir=args.dir) as name:
        folder = Path(name) / "model"
        folder.mkdir()
        stored = make_checkpoint(folder, args.layers)
        print(f"checkpoint of {args.layers} blocks: {stored / 1e9:.2f} GB")
        rows = []
        for bits in args.bits:
            for old_way in (False, True) if args.compare else (False,):
                rows.append(measure_in_child(folder, bits, old_way))
                print_row(rows[-1])
    return {
        "layers": args.layers,
        "stored": stored,
        "limit": LIMIT,
        "rows": rows,
        "machine": describe_machine(),
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the options; the hidden ones are those of a loading process."""
    parser = argparse.ArgumentParser(description="Memory that loading quantized takes.")
    parser.add_argument("--layers", type=int, default=28, help="blocks of the checkpoint (28)")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=(4, 8))
    parser.add_argument("--compare", action="store_true", help="also load in half, then quantize")
    parser.add_argument("--dir", type=Path, help="where the checkpoint is made for a while")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--old-way", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Print a row per load and the report as one JSON line."""
    args = make_parser().parse_args()
    if args.load is not None:
        print(json.dumps(measure_load(args.load, args.bits[0], args.old_way)))
        return 0
    try:
        report = measure_all(args)
    except ValueError as error:
        print(f"bench_memory: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report))
    over = [row for row in report["rows"] if row["way"] == "at once" and row["over"] > LIMIT]
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
