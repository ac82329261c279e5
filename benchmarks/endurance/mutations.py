"""Files of a model folder, damaged in every way: each loads as it is written, or is refused.

A case copies a folder, changes one file of it, and loads the folder in a process of its own, which
may raise ValueError or OSError with the file's name, and nothing else. What loads must be the same
model as before, or what the changed file says: values of JSON are found again in the
configuration, weights are those that torch or safetensors read by themselves. With `--verify` every
change is refused.
"""

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.endurance.campaign import Campaign, Case, Finding, Raised, run_apart
from benchmarks.endurance.folders import scratch, write_sources

SECONDS = 60.0
QUESTION = "你好, how are you?"
IDS = (5, 99, 7849, 7852, 30, 40)  # of a prompt with its [gMASK] and <sop>, and an answer
KINDS = {
    "config.json": "plain",
    "generation_config.json": "plain",
    "tokenizer_config.json": "plain",
    "ice_text.model": "plain",
    "model.safetensors.index.json": "plain",
    "model-00002-of-*.safetensors": "plain",
    "pytorch_model.bin.index.json": "official",
    "pytorch_model-00001-of-00002.bin": "official",
    "adapter_config.json": "adapter",
    "adapter_model.safetensors": "adapter",
}
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 1.5, 10**6, 2**31, 2**63, 10**30, 1e308, -0.0),
    *("", "x", "auto", "float16", "../../etc/passwd", "model.safetensors", [], [1], {}, {"a": 1}),
)
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000000\n"
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return a file's bytes, cut, changed, lengthened or replaced."""
    place = rng.randrange(max(len(data), 1))
    odd = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8, 100))))
    return rng.choice(
        (
            lambda: data[:place],
            lambda: data[:place] + odd + data[place + len(odd) :],
            lambda: data[:place] + odd + data[place:],
            lambda: data[:place] + data[place + 1 :],
            lambda: data[: place % 64] + odd + data[place % 64 + len(odd) :],
            lambda: data + odd,
            lambda: b"",
            lambda: POINTER,
            lambda: b"\xef\xbb\xbf" + data,
            lambda: bytes(len(data)),
            lambda: b"<!DOCTYPE html><html>404: Not Found</html>",
            lambda: data[::-1],
        )
    )()


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return JSON with one value, or one key, anywhere in it, changed."""
    is_leaf = not isinstance(value, dict | list) or not value or rng.random() < 0.1
    if is_leaf:
        return rng.choice(ODD_VALUES)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        return [mutate_json(v, rng) if i == place else v for i, v in enumerate(value)]
    key = rng.choice(list(value))
    changed = dict(value)
    kind = rng.randrange(8)
    if kind == 0:
        del changed[key]
    elif kind == 1:
        changed[rng.choice(("", "x", f"{key} ", key.upper()))] = changed.pop(key)
    else:
        changed[key] = mutate_json(value[key], rng)
    return changed


def mutate_file(path: Path, rng: random.Random) -> str:
    """Change a file; return how, in a word."""
    data = path.read_bytes()
    path.unlink()  # what was read before may be mapped
    if rng.random() < 0.03:
        if rng.random() < 0.5:
            path.mkdir()
            return "became a folder"
        return "is gone"
    if path.suffix == ".json" and rng.random() < 0.7:
        fields = mutate_json(json.loads(data), rng)
        path.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
        return f"is {path.read_text(encoding='utf-8')[:600]}"
    changed = mutate_bytes(data, rng)
    path.write_bytes(changed)
    return f"has {len(changed)} bytes for {len(data)}"


def look(folder: Path, is_verified: bool = False) -> dict[str, Any]:
    """Load a folder and return what is to be seen of it."""
    from chatglm.loading import load_model

    model, tokenizer = load_model(folder, verify=is_verified)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits
    model.generation_config.max_length = None
    answer, _ = model.chat(tokenizer, QUESTION, max_new_tokens=3, do_sample=False)
    ids = tokenizer(QUESTION)["input_ids"]
    return {"logits": logits, "answer": answer, "ids": ids, "config": model.config.to_dict()}


def merge(folder: Path, adapter: Path) -> dict[str, Any]:
    """Merge an adapter into a folder and return the weights."""
    from chatglm import door
    from chatglm.converting.merge import make_parser

    target = adapter.with_name("merged")
    args = make_parser().parse_args([str(folder), str(target), "--lora", str(adapter)])
    with door.package_code():
        args.run(args)
    files = sorted(target.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_alone(path: Path) -> Any:
    """Return what the library of a file's kind reads from it; None for nothing."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8-sig"))
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".bin":
            return torch.load(path, weights_only=True)
        return path.read_bytes()
    except Exception:
        return None


def are_same(one: Any, other: Any) -> bool:
    """Tell whether two readings are equal, tensors bit by bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(are_same(one[k], other[k]) for k in one)
    return type(one) is type(other) and bool(one == other)


def is_refusal(raised: Raised, path: Path, tensors: Any) -> bool:
    """Tell whether an exception is one that callers are promised, and names file or tensor."""
    names = {path.name, str(path.parent), *(tensors if isinstance(tensors, dict) else ())}
    is_kind = bool({"ValueError", "OSError"} & set(raised.kinds))
    return is_kind and any(name in raised.message for name in names)


def is_as_written(path: Path, before: Any, seen: dict[str, Any]) -> bool:
    """Tell whether another model than before is what the changed file says."""
    written = read_alone(path)
    if are_same(written, before):
        return False
    if path.name == "config.json":
        known = {k: v for k, v in written.items() if k in seen["config"] and before.get(k) != v}
        return all(are_same(seen["config"][key], value) for key, value in known.items())
    return "index" not in path.name and written is not None


def judge(found: Any, path: Path, before: Any, truth: Any, is_verified: bool) -> str:
    """Return how a changed file fared, in a word.

    Raises:
        Finding: if it is not as it should be.
    """
    if isinstance(found, Raised):
        if is_refusal(found, path, truth):
            return "refused"
        raise Finding(f"{found.kinds[0]}: {found.message[:300]}\n{found.trace[-600:]}")
    if is_verified:
        raise Finding("--verify lets it through")
    parts = [key for key in truth if key != "config" and not are_same(found[key], truth[key])]
    if not parts:
        return "the same"
    if is_as_written(path, before, found):
        return "as written"
    raise Finding(f"other {', '.join(parts[:3])} than before, and not by what the file says")


def prepare() -> Case:
    """Write the folders that are damaged, and note what they load as."""
    sources = write_sources()
    tasks = {kind: functools.partial(look, sources[kind]) for kind in ("plain", "official")}
    tasks["adapter"] = functools.partial(merge, sources["plain"], sources["adapter"])
    truths = {kind: run_apart(task, SECONDS) for kind, task in tasks.items()}
    if broken := [truth for truth in truths.values() if isinstance(truth, Raised)]:
        raise RuntimeError(f"an undamaged folder fails: {broken[0].trace}")
    return functools.partial(mutate_and_look, sources, truths)


def mutate_and_look(sources: dict[str, Path], truths: dict[str, Any], rng: random.Random) -> str:
    """Change one file and see what becomes of it."""
    name, kind = rng.choice(list(KINDS.items()))
    place = scratch() / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sources[kind], place / "folder")
    (path,) = (place / "folder").glob(name)
    before = read_alone(path)
    data = path.read_bytes()
    how = mutate_file(path, rng)
    is_verified = kind != "adapter" and rng.random() < 0.2
    if path.is_file() and path.read_bytes() == data:
        is_verified = False
    task = functools.partial(look, place / "folder", is_verified)
    if kind == "adapter":
        task = functools.partial(merge, sources["plain"], place / "folder")
    try:
        found = run_apart(task, SECONDS)
        return judge(found, path, before, truths[kind], is_verified)
    except Finding as finding:
        raise Finding(f"{path.name} {how}: {finding}") from None


CAMPAIGN = Campaign(
    "mutations", "Damaged files of every kind", "files", 2000 * len(KINDS), 1, prepare
)
