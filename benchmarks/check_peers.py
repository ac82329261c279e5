"""Finds out which peers are right: their greedy answers beside ours, with the same float32 weights.

    python -m benchmarks.check_peers [--chatglm-cpp PYTHON] [--fastllm PYTHON]
        [--prompts 64 1000 1100 2000] [--write]

A small random model is written for each peer without rounding, and answers prompts of several
lengths. Ours is the judge, since its float32 results are those of the original's golden data. The
model's attention is so strong that what a prompt says decides the answer: a mask or positions that
are not the original's give other tokens. `--write` appends the shares of equal tokens to
benchmarks/results.csv.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from benchmarks.full_size import Recipe, outline_model, read_config
from benchmarks.peer_chatglm_cpp import Shape, iter_tensors, write_model
from benchmarks.peer_fastllm import HEAD, write_configuration
from benchmarks.results import RESULTS, Case, Recorder
from benchmarks.workers import Spread, Worker
from chatglm.benching.measuring import FIRST_PLAIN_ID, never_end

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Recipe(bits=0, layers=2)
# The width and the heads of the 6B model, which fastllm takes for granted; the vocabulary is small.
SHAPE = Shape(layers=2, context=2112, vocabulary=8192, eos_id=8005)
IDS = {"mask_token_id": 8000, "gmask_token_id": 8001, "bos_token_id": 8004, "eos_token_id": 8005}
DEVIATION = 0.0375  # of the matrices
LOUDNESS = 4  # of what the blocks add, which then outweighs the last token's embedding
LOUD = ("attention.dense.weight", "dense_4h_to_h.weight")
PROMPTS = (64, 1000, 1100, 2000)
QUESTIONS = 4  # prompts of each length
TOKENS = 4  # of an answer
Ask = Callable[[list[int]], list[int]]


def make_judge() -> Any:
    """Return our model with random weights, on the CPU in float32."""
    config = read_config(RECIPE) | {**IDS, "vocab_size": SHAPE.vocabulary}
    model = outline_model(RECIPE, config).to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            loudness = LOUDNESS if name.endswith(LOUD) else 1
            parameter.data.normal_(0, loudness * DEVIATION, generator=generator)
        else:
            parameter.data.fill_(0 if name.endswith("bias") else 1)
    never_end(model)
    return model


def draw_questions(model: Any, length: int) -> list[list[int]]:
    """Return prompts of so many tokens that end as GLM's do."""
    config = model.config
    generator = torch.Generator().manual_seed(length)
    last = min(config.gmask_token_id, config.mask_token_id)
    size = (QUESTIONS, length - 2)
    plain = torch.randint(FIRST_PLAIN_ID, last, size, generator=generator).tolist()
    return [[*row, config.gmask_token_id, config.bos_token_id] for row in plain]


def answer_ourselves(model: Any) -> Ask:
    """Return what answers with our model."""

    def ask(ids: list[int]) -> list[int]:
        options = {"do_sample": False, "max_new_tokens": TOKENS}
        return model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()

    return ask


def start_chatglm_cpp(python: Path, folder: Path, model: Any) -> Worker:
    """Write the model in chatglm.cpp's format, and start the peer with it."""
    tensors = model.state_dict()
    weights = {
        name: tensors[name].contiguous().numpy().tobytes() for name, _, _ in iter_tensors(SHAPE)
    }
    file = folder / "chatglm.bin"
    write_model(file, SHAPE, ROOT / "ice_text.model", weights)
    command = [str(python), "-m", "benchmarks.peer_chatglm_cpp", "--serve", str(file)]
    return Worker("chatglm.cpp float32", command)


def start_fastllm(python: Path, folder: Path, model: Any) -> Worker:
    """Write the model as a folder for fastllm, and start the peer with it."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors[HEAD] = tensors["transformer.word_embeddings.weight"].clone()
    (folder / "fastllm").mkdir()
    save_file(tensors, folder / "fastllm" / "model.safetensors", metadata={"format": "pt"})
    write_configuration(folder / "fastllm", SHAPE, IDS)
    command = [str(python), "-m", "benchmarks.peer_fastllm", "--threads", "1"]
    command += ["--dtype", "float32", "--serve", str(folder / "fastllm")]
    return Worker("fastllm float32", command)


def compare(expected: Sequence[list[int]], found: Sequence[list[int]]) -> tuple[float, float]:
    """Return the shares of first tokens and of whole answers that are equal.

    Raises:
        ValueError: if the expected answers are so alike that equal ones tell nothing.
    """
    if 2 * len({ids[0] for ids in expected}) < len(expected):
        raise ValueError(f"the prompts do not decide the answers {list(expected)}: nothing is told")
    pairs = list(zip(expected, found))
    first = sum(a[:1] == b[:1] for a, b in pairs) / len(pairs)
    return first, sum(a == b for a, b in pairs) / len(pairs)


def check_all(args: argparse.Namespace) -> None:
    """Compare every peer at every length."""
    recorder = Recorder("check_peers", RECIPE.layers, 1, RESULTS if args.write else None)
    model = make_judge()
    judge = answer_ourselves(model)
    starts = ((start_chatglm_cpp, args.chatglm_cpp), (start_fastllm, args.fastllm))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = [
            stack.enter_context(start(python, folder, model)) for start, python in starts if python
        ]
        for length in args.prompts:
            questions = draw_questions(model, length)
            expected = [judge(ids) for ids in questions]
            for peer in peers:
                found = [ask_peer(peer, ids) for ids in questions]
                record(recorder, peer, length, compare(expected, found))


def ask_peer(peer: Worker, ids: list[int]) -> list[int]:
    """Return what a peer answers; nothing if it cannot, which it says."""
    try:
        return peer.ask("answer", input_ids=ids, tokens=TOKENS)["ids"]
    except ValueError as error:
        reason = str(error).rpartition(": ")[2]
        print(f"{peer.name} has no answer to a prompt of {len(ids)} tokens: {reason}")
        return []


def record(recorder: Recorder, peer: Worker, length: int, shares: tuple[float, float]) -> None:
    """Record what share of a peer's answers is ours."""
    case = Case(peer.name, "answers as ours", peer.facts["versions"], length, rounds=QUESTIONS)
    for unit, share in zip(("equal first tokens", "equal answers"), shares):
        recorder.add(case, Spread.of([share]), unit)


def make_parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Which peers answer as the original does.")
    add = parser.add_argument
    add("--chatglm-cpp", type=Path, metavar="PYTHON", help="of install_peers.sh")
    add("--fastllm", type=Path, metavar="PYTHON", help="of install_peers.sh")
    add("--prompts", type=int, nargs="+", default=list(PROMPTS), metavar="N")
    add("--write", action="store_true", help="append to benchmarks/results.csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print and record; return the exit code."""
    args = make_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    try:
        check_all(args)
    except ValueError as error:
        print(f"check_peers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
