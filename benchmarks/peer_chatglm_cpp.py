"""The peer chatglm.cpp as a contender: `benchmarks.serving` around its own Python package.

    PYTHON -m benchmarks.peer_chatglm_cpp --write FILE --layers 28 --context 2112
    PYTHON -m benchmarks.peer_chatglm_cpp --serve FILE

Writes a random model of the 6B shape in the package's own file format, q4_0 in every matrix and in
the embedding that is also the head, and measures with the call its own pipeline makes for a token.
Standard library only, beside `chatglm_cpp` itself: it runs in the peer's environment.

A context is not read token by token, which takes the peer minutes: the memory of its cache is
touched by decoding single tokens at places as far apart as a page is wide, and holds zeros between
them. The time of a step does not depend on the values.
"""

import argparse
import json
import os
import random
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from benchmarks.serving import serve

ROOT = Path(__file__).resolve().parent.parent
PRESET = ROOT / "chatglm" / "presets" / "chatglm-6b" / "config.json"
F32, Q4_0 = 0, 2  # numbers of the format
GROUP_SIZE, ALIGNMENT = 32, 16
PATTERN_GROUPS = 2**16  # random groups of weights that are repeated
SCALE = 0.02 / 7
TOUCH_STEP = 8  # places; a page of half keys holds 16 of them


class Shape(NamedTuple):
    """The sizes of a model and the most positions its cache must hold."""

    layers: int
    context: int
    hidden: int = 4096
    inner: int = 16384
    heads: int = 32
    vocabulary: int = 130528
    eos_id: int = 130005
    pad_id: int = 3

    @classmethod
    def of_preset(cls, layers: int, context: int) -> "Shape":
        """Return the sizes of the 6B model with so many blocks."""
        config = json.loads(PRESET.read_text(encoding="utf-8"))
        return cls(
            layers,
            context,
            config["hidden_size"],
            config["inner_hidden_size"],
            config["num_attention_heads"],
            config["vocab_size"],
            config["eos_token_id"],
            config["pad_token_id"],
        )


def iter_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Yield name, sizes and, for what is no matrix, the value of each stored tensor."""
    hidden, inner = shape.hidden, shape.inner
    matrices = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }
    yield "transformer.word_embeddings.weight", (shape.vocabulary, hidden), 0.0
    for index in range(shape.layers):
        block = f"transformer.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{norm}.weight", (hidden,), 1.0
            yield f"{block}.{norm}.bias", (hidden,), 0.0
        for name, sizes in matrices.items():
            yield f"{block}.{name}.weight", sizes, 0.0
            yield f"{block}.{name}.bias", sizes[:1], 0.0
    yield "transformer.final_layernorm.weight", (hidden,), 1.0
    yield "transformer.final_layernorm.bias", (hidden,), 0.0


def write_model(
    path: Path, shape: Shape, vocabulary: Path, weights: Mapping[str, bytes] | None = None
) -> int:
    """Write a model file, and return the bytes of its tensors that a token reads.

    Args:
        path: the file.
        shape: of the model.
        vocabulary: a SentencePiece model, which the format carries.
        weights: float32 values by name; None for random q4_0.
    """
    scale = struct.pack("<e", SCALE)
    generator = random.Random(0)
    pattern = b"".join(scale + generator.randbytes(GROUP_SIZE // 2) for _ in range(PATTERN_GROUPS))
    read = 0
    with path.open("wb") as file:
        _write_head(file, shape, vocabulary.read_bytes(), Q4_0 if weights is None else F32)
        for name, sizes, value in iter_tensors(shape):
            if weights is None:
                read += _write_tensor(file, name, sizes, value, pattern)
            else:
                _write_name(file, name, sizes, F32)
                read += file.write(weights[name])
    return read


def _write_head(file: BinaryIO, shape: Shape, vocabulary: bytes, kind: int) -> None:
    """Write the magic, the kind of model (1), its version (2), its sizes and the vocabulary."""
    sizes = (shape.vocabulary, shape.hidden, shape.heads, shape.heads, shape.layers, shape.inner)
    file.write(b"ggml" + struct.pack("<3i", 1, 2, kind) + struct.pack("<6i", *sizes))
    ends = (shape.context, shape.eos_id, shape.pad_id)
    file.write(struct.pack("<fif3i", 1e-5, 0, 10000.0, *ends))
    file.write(struct.pack("<i", len(vocabulary)) + vocabulary)


def _write_tensor(
    file: BinaryIO, name: str, sizes: tuple[int, ...], value: float, pattern: bytes
) -> int:
    """Write one tensor, and return the bytes of its values."""
    kind = Q4_0 if len(sizes) == 2 else F32
    _write_name(file, name, sizes, kind)
    if kind == F32:
        return file.write(struct.pack("<f", value) * sizes[0])
    missing = total = sizes[0] * sizes[1] // GROUP_SIZE * (2 + GROUP_SIZE // 2)
    while missing > 0:
        missing -= file.write(pattern[:missing])
    return total


def _write_name(file: BinaryIO, name: str, sizes: tuple[int, ...], kind: int) -> None:
    """Write what stands before a tensor's values."""
    file.write(struct.pack("<i", len(name)) + name.encode())
    file.write(struct.pack(f"<{2 + len(sizes)}i", len(sizes), *sizes, kind))
    file.write(bytes(-file.tell() % ALIGNMENT))


class ChatGLMCpp:
    """The peer's pipeline around a model file."""

    def __init__(self, path: Path) -> None:
        from chatglm_cpp import _C, Pipeline  # pyright: ignore[reportMissingImports]

        self.pipeline = Pipeline(str(path))
        self.model: Any = self.pipeline.model
        self.greedy = _C.GenerationConfig(do_sample=False)
        self.touched = 0

    def describe(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        import chatglm_cpp  # pyright: ignore[reportMissingImports]

        config = self.model.config
        return {
            "versions": f"chatglm-cpp {chatglm_cpp.__version__}",
            "threads": count_threads(),
            "kv_bytes": 4 * config.num_hidden_layers * config.hidden_size,  # halves
        }

    def prefill(self, tokens: int, batch: int = 1) -> dict[str, Any]:
        """Return the seconds from a prompt of so many tokens to the first of its answer."""
        _check_batch(batch)
        ids = draw_ids(tokens)
        began = time.perf_counter()
        self._step(ids, 0, tokens)
        return {"seconds": time.perf_counter() - began}

    def decode(self, context: int, tokens: int, batch: int = 1) -> dict[str, Any]:
        """Return the seconds of each of so many tokens behind a context."""
        _check_batch(batch)
        self._touch(context)
        ids = draw_ids(context + 1)
        seconds = []
        for _ in range(tokens + 1):  # the first finds the caches cold
            began = time.perf_counter()
            ids.append(self._step(ids, len(ids) - 1, context))
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds[1:]}

    def answer(self, input_ids: list[int], tokens: int) -> dict[str, Any]:
        """Return the greedy answer to a prompt that ends as GLM's do."""
        ids, past = [*input_ids], 0
        for _ in range(tokens):
            ids.append(self._step(ids, past, len(input_ids)))
            past = len(ids) - 1
        return {"ids": ids[len(input_ids) :]}

    def _touch(self, context: int) -> None:
        """Have every page of the cache's first `context` places be memory of its own."""
        if self.touched == 0:
            self._step(draw_ids(2), 0, 2)
        for place in range(max(self.touched, 2), context, TOUCH_STEP):
            self._step(draw_ids(place + 1), place, place)
        self.touched = max(self.touched, context)

    def _step(self, ids: list[int], past: int, context: int) -> int:
        return self.model.generate_next_token(ids, None, self.greedy, past, context)


def count_threads() -> int:
    """Return the threads the peer decodes with: it takes what it finds, and asks nobody."""
    cpus = os.cpu_count() or 4
    return min(cpus if cpus <= 4 else cpus // 2, 16)


def draw_ids(count: int) -> list[int]:
    """Return random ids of plain tokens."""
    generator = random.Random(count)
    return [generator.randrange(4, 8000) for _ in range(count)]


def _check_batch(batch: int) -> None:
    if batch != 1:
        raise ValueError(f"chatglm.cpp has no batches, got {batch}")


def main() -> None:
    """Write a model file, or serve one."""
    parser = argparse.ArgumentParser(description="chatglm.cpp as a contender.")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--serve", type=Path, metavar="FILE")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--context", type=int, default=2112, help="positions of the cache")
    args = parser.parse_args()
    if args.write:
        shape = Shape.of_preset(args.layers, args.context)
        print(json.dumps({"bytes": write_model(args.write, shape, ROOT / "ice_text.model")}))
    else:
        serve(lambda: ChatGLMCpp(args.serve))


if __name__ == "__main__":
    main()
