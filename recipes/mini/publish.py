"""Writes the trained weights as this repository's checkpoint: float16 shards and their index.

    python -m recipes.mini.publish --work DIR [--out ROOT]
    python -m recipes.mini.publish --model FOLDER [--out ROOT]

Works from whatever `state.pt` the training has saved so far, or from a folder that `chatglm train`
has written. The files have the official form:
`lm_head.weight` is stored although it is tied to the embedding (4 MB more), so that whoever reads
the official shards reads these. The official shards also hold a `rotary_emb.inv_freq` buffer per
layer; no version of the code ever loaded it, and it follows from the config, so it is left out.
"""

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.mini.corpus import ROOT

MAX_SHARD_BYTES = 8_000_000  # of tensors; the container adds some 300 bytes for each
EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
INDEX_NAME = "pytorch_model.bin.index.json"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a training state, or of a model's one file, in float16.

    Args:
        path: `state.pt` or `model.safetensors`.

    Raises:
        ValueError: if there is no such file, or a weight has no finite value in float16.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: train first (python -m recipes.mini.train)")
    state = read_model(path) if path.suffix == ".safetensors" else read_state(path)
    weights = {name: tensor.half() for name, tensor in state.items()}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            largest = state[name].abs().max().item()
            raise ValueError(f"{name} reaches {largest}, float16 ends at 65504: raise the decay")
    return weights


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the weights of a training state."""
    return torch.load(path, map_location="cpu", weights_only=True)["model"]


def read_model(path: Path) -> dict[str, Tensor]:
    """Return the weights of a model's file in the network's order, the tied head named too."""
    stored = load_file(path)
    stored.setdefault(HEAD, stored[EMBEDDING])
    config = AutoConfig.from_pretrained(path.parent, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    return {name: stored[name] for name in model.state_dict()}


def split_weights(weights: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Cut the weights, in their order, into shards of at most `limit` bytes or one tensor."""
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in weights.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def pack_shard(shard: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a shard's file; the same tensors give the same bytes."""
    buffer = io.BytesIO()  # a file's name would become part of its content
    torch.save(dict(shard), buffer)
    return buffer.getvalue()


def build_files(weights: Mapping[str, Tensor], limit: int = MAX_SHARD_BYTES) -> dict[str, bytes]:
    """Return the checkpoint's files, the index last."""
    shards = split_weights(weights, limit)
    names = [f"pytorch_model-{k:05d}-of-{len(shards):05d}.bin" for k in range(1, len(shards) + 1)]
    places = {weight: name for name, shard in zip(names, shards) for weight in shard}
    total_size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(places.items()))}
    files = {name: pack_shard(shard) for name, shard in zip(names, shards)}
    return files | {INDEX_NAME: (json.dumps(index, indent=2) + "\n").encode()}


def write_files(files: Mapping[str, bytes], out: Path) -> None:
    """Write all files under temporary names, then name them, then remove shards of older cuts."""
    out.mkdir(parents=True, exist_ok=True)
    partials = {out / name: out / f"{name}.part" for name in files}
    for content, partial in zip(files.values(), partials.values()):
        partial.write_bytes(content)
    for target, partial in partials.items():
        partial.replace(target)
    for path in out.glob("pytorch_model-*-of-*.bin"):
        if path.name not in files:
            path.unlink()


def main(argv: list[str] | None = None) -> int:
    """Write the checkpoint and print the SHA-256 of each file; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the trained weights as float16 shards.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--work", type=Path, help="folder of recipes.mini.train")
    source.add_argument("--model", type=Path, help="folder of chatglm train, instead")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder of the checkpoint")
    args = parser.parse_args(argv)
    try:
        path = args.work / "state.pt" if args.work else args.model / "model.safetensors"
        files = build_files(read_weights(path))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    write_files(files, args.out)
    for name, content in files.items():
        sys.stdout.write(f"{hashlib.sha256(content).hexdigest()}  {len(content):>9}  {name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
