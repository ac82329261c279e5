"""The peer fastllm as a contender: `benchmarks.serving` around its own library's calls.

    PYTHON -m benchmarks.peer_fastllm --write FOLDER --layers 28
    PYTHON -m benchmarks.peer_fastllm --serve FOLDER --threads 2

Writes a random float16 model of the 6B shape as a folder of one safetensors file, which the peer
quantizes while it loads (it reads neither the official shards nor the tokenizer), and measures by
the calls of its Python package. Standard library only, beside `ftllm` itself: it runs in the peer's
environment.

A context cannot be put into its cache, and reading it takes minutes: it is read once, and what is
answered goes on from round to round. The context grows by the tokens of the rounds before.
"""

import argparse
import ctypes
import itertools
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peer_chatglm_cpp import PRESET, Shape, draw_ids, iter_tensors
from benchmarks.serving import serve

ROOT = Path(__file__).resolve().parent.parent
ALIGNMENT = 8
PATTERN_VALUES = 2**20  # random halves that are repeated
DEVIATION = 0.02
HEAD = "lm_head.weight"
# What the library is asked to make of the weights.
DTYPE, GROUP_SIZE = "int4", 128
PATIENCE, ANSWER_PATIENCE = 900, 30  # seconds that a token may take, of a long prompt or a short
PIECE = 64  # tokens that are fetched at once at most
ROOM = 2000  # tokens of an answer that goes on from round to round


def write_folder(folder: Path, shape: Shape) -> int:
    """Write a random model as a folder; return the bytes of weights that a token reads as INT4.

    The matrices' scales, one a row, are left out of the bytes.
    """
    tensors = [*iter_tensors(shape), (HEAD, (shape.vocabulary, shape.hidden), 0.0)]
    header, place, read = {}, 0, 0
    for name, sizes, _ in tensors:
        count = sizes[0] * (sizes[1] if len(sizes) == 2 else 1)
        spot = {"dtype": "F16", "shape": sizes, "data_offsets": [place, place + 2 * count]}
        header[name] = spot
        place += 2 * count
        read += count // 2 if len(sizes) == 2 and "word_embeddings" not in name else 0
    generator = random.Random(0)
    values = [generator.gauss(0, DEVIATION) for _ in range(PATTERN_VALUES)]
    pattern = struct.pack(f"<{PATTERN_VALUES}e", *values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, sizes, value in tensors:
            missing = 2 * sizes[0] * (sizes[1] if len(sizes) == 2 else 1)
            constant = struct.pack("<e", value) * min(sizes[0], PATTERN_VALUES)
            while missing > 0:
                missing -= file.write((pattern if len(sizes) == 2 else constant)[:missing])
    write_configuration(folder, shape)
    return read


def write_configuration(
    folder: Path, shape: Shape, special_ids: Mapping[str, int] | None = None
) -> None:
    """Put what the peer wants to find beside the weights into a folder."""
    config = json.loads(PRESET.read_text(encoding="utf-8"))
    config |= {"num_layers": shape.layers, "hidden_size": shape.hidden}
    config |= {"inner_hidden_size": shape.inner, "num_attention_heads": shape.heads}
    config |= {"vocab_size": shape.vocabulary, **(special_ids or {})}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(PRESET.parent / name, folder)


class FastLLM:
    """The peer's library around a folder.

    Args:
        folder: of `write_folder`.
        threads: that it computes with.
        dtype: that it makes of the weights, one of its own names.
    """

    def __init__(self, folder: Path, threads: int, dtype: str = DTYPE) -> None:
        from ftllm import llm  # pyright: ignore[reportMissingImports]

        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.library: Any = llm.fastllm_lib
        llm.set_cpu_threads(threads)
        # The package's own class refuses the folder: it does not know the tokenizer's class.
        number = self.library.create_llm_model_fromhf(
            str(folder).encode(),
            llm.fastllm_data_type_dict[dtype],
            GROUP_SIZE,
            ctypes.c_bool(True),
            b"",
            ctypes.c_bool(False),
            0,
            128,
            b"",
        )
        self.model: Any = llm.model("", id=number)
        self.threads = threads
        self.buffer: Any = (ctypes.c_int * PIECE)()
        self.patience = PATIENCE
        self.context, self.handle = 0, -1  # of an answer that goes on
        self.answer(self._mark(draw_ids(8)), 2)  # its threads are bound when they are first used
        free_threads()

    def describe(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        from importlib.metadata import version

        kv_bytes = 4 * self.config["num_layers"] * self.config["hidden_size"]  # halves
        versions = f"ftllm {version('ftllm')}"
        return {"versions": versions, "threads": self.threads, "kv_bytes": kv_bytes}

    def prefill(self, tokens: int, batch: int = 1) -> dict[str, Any]:
        """Return the seconds from a prompt of so many tokens to the first of its answer."""
        _check_batch(batch)
        self._stop()
        ids = self._mark(draw_ids(tokens))
        began = time.perf_counter()
        handle = self._launch(ids, 1)
        token = self._fetch(handle)
        seconds = time.perf_counter() - began
        if not token:
            raise ValueError(f"the prompt of {tokens} tokens has no answer")
        self._finish(handle)
        return {"seconds": seconds}

    def decode(self, context: int, tokens: int, batch: int = 1) -> dict[str, Any]:
        """Return the seconds of each of so many tokens behind a context."""
        _check_batch(batch)
        if context != self.context:
            self._stop()
            self.handle = self._launch(self._mark(draw_ids(context)), ROOM)
            self.context = context
        # What the prompt or the time between two requests gave, and one that finds caches cold.
        self._fetch(self.handle)
        self._fetch(self.handle)
        moments = [time.perf_counter()]
        while len(moments) <= tokens:
            new = self._fetch(self.handle)
            if not new:
                raise ValueError(f"the answer behind {context} tokens ended, within {ROOM}")
            moments += [time.perf_counter()] * len(new)
        return {"seconds": [b - a for a, b in itertools.pairwise(moments)]}

    def _stop(self) -> None:
        """End the answer that goes on, if there is one."""
        if self.context:
            self.library.abort_response_llm_model(self.model.model, self.handle)
            self._finish(self.handle)
        self.context = 0

    def answer(self, input_ids: list[int], tokens: int) -> dict[str, Any]:
        """Return the greedy answer to a prompt that ends as GLM's do.

        Some never end: then nothing comes of them, not even an error.
        """
        self.patience = ANSWER_PATIENCE
        handle = self._launch(input_ids, tokens)
        ids: list[int] = []
        while new := self._fetch(handle):
            ids += new
        return {"ids": ids}

    def _mark(self, ids: list[int]) -> list[int]:
        """Return a prompt with GLM's two markers at its end."""
        return [*ids[:-2], self.config["gmask_token_id"], self.config["bos_token_id"]]

    def _launch(self, ids: list[int], tokens: int) -> int:
        """Hand a prompt over, and return the number of its answer."""
        array = (ctypes.c_int * len(ids))(*ids)
        one = ctypes.c_float(1)
        length, stops = self.model.stop_token_ctypes(None)
        greedy = (tokens, 0, ctypes.c_bool(False), one, 1, one, one, ctypes.c_bool(False))
        return self.library.launch_response_llm_model(
            self.model.model, len(ids), array, *greedy, length, stops
        )

    def _fetch(self, handle: int) -> list[int]:
        """Wait for the next tokens of an answer; none are there at its end, which comes once."""
        fetch = self.library.fetch_response_tokens_batch_llm_model
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            count = fetch(self.model.model, handle, self.buffer, PIECE)
            if count:
                return list(self.buffer[: max(count, 0)])
        self.library.abort_response_llm_model(self.model.model, handle)
        raise ValueError(f"no token came within {self.patience} s")

    def _finish(self, handle: int) -> None:
        """Wait until the library has let go of an answer."""
        while self._fetch(handle):
            pass


def free_threads() -> None:
    """Let the library's threads run on any processor: it binds each to one, beside others' work."""
    everywhere = set(range(os.cpu_count() or 1))
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), everywhere)


def _check_batch(batch: int) -> None:
    if batch != 1:
        raise ValueError(f"fastllm is measured with one row, got {batch}")


def main() -> None:
    """Write a model folder, or serve one."""
    parser = argparse.ArgumentParser(description="fastllm as a contender.")
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    parser.add_argument("--serve", type=Path, metavar="FOLDER")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default=DTYPE, help="of the weights, in fastllm's words (int4)")
    args = parser.parse_args()
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        read = write_folder(args.write, Shape.of_preset(args.layers, 0))
        print(json.dumps({"bytes": read}))
    else:
        serve(lambda: FastLLM(args.serve, args.threads, args.dtype))


if __name__ == "__main__":
    main()
