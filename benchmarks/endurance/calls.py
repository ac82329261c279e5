"""Random calls of `forward`, `generate`, `chat` and `stream_chat`: right, or refused clearly.

A call is right if the engine's kernels and plain torch give the same, what is returned has the
shapes and the parts that are promised, and a cache goes on as the whole does. A refusal is a
ValueError, TypeError or NotImplementedError; of tensors with impossible shapes, dtypes or ids torch
may also say so itself (RuntimeError, IndexError), in `forward` and `generate` alone, and a package
that is not installed is named (ImportError). Some calls share a process of their own, which may
neither crash nor hang.
"""

import copy
import functools
import importlib
import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

import chatglm.model
from benchmarks.endurance.campaign import Campaign, Case, Finding, Raised, Tally, run_apart
from benchmarks.endurance.folders import make_model
from benchmarks.results import ROOT

CALLS = 20  # of a process
SECONDS = 300.0
NEAR = {torch.float32: 2e-3, torch.bfloat16: 0.5}
CLEAR = (ValueError, TypeError, NotImplementedError)
FROM_TORCH = (*CLEAR, RuntimeError, IndexError, ImportError)
GMASK, SOP, PAD, VOCABULARY = 7849, 7852, 3, 8192
ODD = (None, True, 0, 1, -1, 0.0, 0.5, 1.0, -0.5, 2.0, 7, 10**6, "x", [], [7853], float("nan"))


def make_models() -> list[Any]:
    """Return models of each kind that computes in a way of its own."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}
    return [
        make_model(),
        make_model(position_encoding_2d=False),
        make_model(pre_seq_len=3),
        make_model(rope_scaling=scaling),
        make_model().bfloat16(),
        make_model().quantize(8),
        make_model().quantize(4),
    ]


def draw_ids(rng: random.Random, rows: int, length: int) -> Tensor:
    """Return ids with or without pads, blank and `<sop>`; now and then impossible ones."""
    ids = torch.tensor([[rng.randrange(5, 7800) for _ in range(length)] for _ in range(rows)])
    ids = ids.reshape(rows, length).long()
    for row in ids:
        if length > 3 and rng.random() < 0.8:
            row[: rng.choice((0, 0, 1, length // 3))] = PAD
            place = rng.randrange(2, length)
            row[place - 1], row[place] = GMASK, SOP
    if ids.numel() and rng.random() < 0.05:
        ids.view(-1)[-1] = rng.choice((-1, VOCABULARY, 2**40))
    return ids.to(rng.choice((torch.int32, torch.float32))) if rng.random() < 0.05 else ids


def draw_mask(rng: random.Random, rows: int, length: int, past: int) -> Tensor | None:
    """Return a mask of a form that there is, or nearly."""
    keys = past + length
    odd = rng.choice((0, 0, 0, 0, 1, -1))
    flat = torch.ones(rows, max(keys + odd, 0), dtype=torch.long)
    if rows and keys > 2 and rng.random() < 0.5:
        flat[0, : rng.randrange(keys)] = 0
    square = torch.rand(rows, 1, length, max(keys + odd, 0)) < 0.2
    return rng.choice(
        (
            None,
            flat,
            flat.bool(),
            flat.float(),
            square,
            square[:, 0],
            square.float() * -1e4,
            square.long(),
            flat[:, None],
            torch.ones(rows),
        )
    )


def draw_forward(rng: random.Random, model: Any) -> dict[str, Any]:
    """Return arguments of a forward pass, with a cache that holds something now and then."""
    rows, length = rng.choice((0, 1, 1, 1, 2, 3)), rng.choice((0, 1, 1, 2, 7, 8, 9, 33))
    past, cache = 0, None
    if rng.random() < 0.4:
        past = rng.choice((0, 1, 5, 20))
        cache = DynamicCache()
        if past:
            ids = draw_ids(rng, max(rows + rng.choice((0, 0, 0, 1)), 1), past).long()
            output = model(ids.clamp(0, VOCABULARY - 1), use_cache=True)
            cache = output.get("cache", output.get("past_key_values"))
    options: dict[str, Any] = {"input_ids": draw_ids(rng, rows, length)}
    chances: dict[str, Callable[[], Any]] = {
        "attention_mask": lambda: draw_mask(rng, rows, length, past),
        "position_ids": lambda: torch.randint(
            0, 40, rng.choice(((rows, 2, length), (rows, length), (1, length), (rows, 1, length)))
        ),
        "past_key_values": lambda: cache,
        "labels": lambda: draw_ids(rng, rows, length + rng.choice((0, 0, 1))),
        "inputs_embeds": lambda: torch.randn(rows, length, rng.choice((32, 32, 31))),
        "use_cache": lambda: rng.choice((True, False, None)),
        "output_attentions": lambda: rng.choice((True, False)),
        "output_hidden_states": lambda: rng.choice((True, False)),
        "return_dict": lambda: rng.choice((True, False, None)),
        "logits_to_keep": lambda: rng.choice((0, 1, 2, 100, -1, torch.arange(min(length, 2)))),
    }
    options |= {name: draw() for name, draw in chances.items() if rng.random() < 0.3}
    if rng.random() < 0.1:
        options.pop("input_ids")
    return options


def call_forward(model: Any, options: dict[str, Any]) -> Any:
    """Return the tensors of an output."""
    with torch.no_grad():
        output = model(**copy.deepcopy(options))
    logits = (
        output["logits"]
        if isinstance(output, dict)
        else next(part for part in output if isinstance(part, Tensor) and part.dim() > 1)
    )
    ids: Any = options.get("input_ids", options.get("inputs_embeds"))
    if logits.shape[-1] != VOCABULARY or (logits.dim() == 3 and logits.shape[0] != ids.shape[0]):
        raise Finding(f"logits have the shape {tuple(logits.shape)}")
    return logits


def draw_generate(rng: random.Random, model: Any) -> dict[str, Any]:
    """Return arguments of `generate`, most of them possible."""
    rows, length = rng.choice((1, 1, 2, 3)), rng.choice((0, 1, 2, 9, 30))
    options: dict[str, Any] = {
        "inputs": draw_ids(rng, rows, length),
        "max_new_tokens": rng.choice((1, 3, 3, 5, 0, -1)),
        "do_sample": False,
    }
    chances: dict[str, Callable[[], Any]] = {
        "attention_mask": lambda: draw_mask(rng, rows, length, 0),
        "num_beams": lambda: rng.choice((1, 2, 3, 0)),
        "num_return_sequences": lambda: rng.choice((1, 2, 3, 0)),
        "temperature": lambda: rng.choice(ODD),
        "top_p": lambda: rng.choice(ODD),
        "top_k": lambda: rng.choice(ODD),
        "repetition_penalty": lambda: rng.choice((1.0, 1.2, 0.0, -1.0)),
        "use_cache": lambda: rng.choice((True, False)),
        "eos_token_id": lambda: rng.choice((7853, [7853, 2], None, -1)),
        "cache_implementation": lambda: rng.choice(("static", "dynamic", "quantized", "x")),
        "min_new_tokens": lambda: rng.choice((0, 2, 9)),
        "no_repeat_ngram_size": lambda: rng.choice((0, 1, 2)),
        "prompt_lookup_num_tokens": lambda: 3,
        "return_dict_in_generate": lambda: True,
    }
    return options | {name: draw() for name, draw in chances.items() if rng.random() < 0.15}


def call_generate(model: Any, options: dict[str, Any]) -> Any:
    """Return the ids of all rows."""
    output = model.generate(**copy.deepcopy(options))
    ids = output if isinstance(output, Tensor) else output.sequences
    limit = options["inputs"].shape[1] + options["max_new_tokens"]
    if ids.shape[1] > max(limit, 0) or (ids.numel() and not 0 <= ids.min() <= ids.max() < 8192):
        raise Finding(f"an answer of the shape {tuple(ids.shape)} with ids up to {ids.max()}")
    return ids


def draw_chat(rng: random.Random, model: Any) -> dict[str, Any]:
    """Return arguments of `chat`, most of them possible."""
    texts = ("你好", "Hello!", "", " ", "<sop>", "x" * 300, "a\nb", "\0", "\ud800", None, 7, ["a"])
    pair = ("hi", "hello")
    histories = (None, [], [pair], [list(pair)] * 3, (pair,), ["x"], [pair, ("a",)], "x", [{}], 3)
    options: dict[str, Any] = {
        "query": rng.choice(texts[:6] if rng.random() < 0.7 else texts),
        "max_new_tokens": 3,
        "do_sample": False,
    }
    chances: dict[str, Callable[[], Any]] = {
        "history": lambda: rng.choice(histories),
        "max_length": lambda: rng.choice((2048, 40, 10, 0, -1, None, "x")),
        "max_new_tokens": lambda: rng.choice((1, 4, 0, -1, None, 2.5, "x")),
        "num_beams": lambda: rng.choice((1, 2, 0, -1, "x")),
        "do_sample": lambda: rng.choice((True, False, None)),
        "temperature": lambda: rng.choice(ODD),
        "top_p": lambda: rng.choice(ODD),
        "stop": lambda: rng.choice((None, "a", ["a", "b"], [], "", [""], 3, [None])),
        "logits_processor": lambda: rng.choice((None, [])),
        "num_return_sequences": lambda: rng.choice((1, 2, 0)),
        "repetition_penalty": lambda: rng.choice((1.1, 0.0, -1.0, "x")),
        "unknown_option": lambda: 1,
    }
    options |= {name: draw() for name, draw in chances.items() if rng.random() < 0.15}
    if options.get("max_new_tokens", 1) is None:
        options["max_length"] = 60
    return options


def call_chat(model: Any, options: dict[str, Any], tokenizer: Any, is_stream: bool) -> Any:
    """Return an answer; that of a stream is its last."""
    given = copy.deepcopy(options)
    if is_stream:
        answers = list(model.stream_chat(tokenizer, **given))
        answer, history = answers[-1] if answers else ("", [*(given.get("history") or []), None])
    else:
        answer, history = model.chat(tokenizer, **given)
        if history[-1] != (options["query"], answer):
            raise Finding(f"the history ends in {history[-1]!r}, the answer is {answer!r}")
    if not isinstance(answer, str) or len(history) != len(options.get("history") or []) + 1:
        raise Finding(f"{answer!r} and a history of {len(history)} rounds")
    return answer


def try_call(call: Callable[[], Any], allowed: tuple[type[Exception], ...]) -> Any:
    """Return what a call gives, or the exception that it may raise."""
    try:
        return call()
    except allowed as error:
        if not str(error):
            raise Finding(f"{type(error).__name__} without a word") from error
        return error


def compare(fast: Any, slow: Any, dtype: torch.dtype) -> str:
    """Return "right" or "refused" if kernels and plain torch agree, or raise `Finding`."""
    if isinstance(fast, Exception) or isinstance(slow, Exception):
        if type(fast) is not type(slow):
            raise Finding(f"kernels: {_show(fast)}; plain torch: {_show(slow)}")
        return "refused"
    if not isinstance(fast, Tensor):
        if fast != slow:
            raise Finding(f"kernels answer {fast!r}, plain torch {slow!r}")
        return "right"
    if fast.shape != slow.shape:
        raise Finding(f"kernels: {tuple(fast.shape)}, plain torch: {tuple(slow.shape)}")
    if fast.is_floating_point():
        if not torch.allclose(fast.float(), slow.float(), atol=NEAR[dtype], equal_nan=True):
            raise Finding(f"logits differ by up to {(fast - slow).abs().max():.3g}")
    elif not torch.equal(fast, slow):
        raise Finding(f"kernels generate {fast.tolist()}, plain torch {slow.tolist()}")
    return "right"


def _show(result: Any) -> str:
    if isinstance(result, Exception):
        return f"{type(result).__name__}({str(result)[:200]})"
    return str(result)[:200]


def show_call(name: str, place: int, options: dict[str, Any]) -> str:
    """Return a call as text, short tensors whole."""

    def show(value: Any) -> str:
        if isinstance(value, Tensor):
            values = value.tolist() if value.numel() <= 40 else tuple(value.shape)
            return f"{str(value.dtype)[6:]} {values}"
        return f"{type(value).__name__}" if hasattr(value, "layers") else repr(value)

    return f"{name} of model {place}: " + ", ".join(f"{k}={show(v)}" for k, v in options.items())


def make_call(models: list[Any], tokenizer: Any, rng: random.Random) -> tuple[str, str]:
    """Make one random call, with kernels and without; return how it ended, and what was found."""
    place = rng.randrange(len(models))
    model = models[place]
    kind = rng.choice(("forward", "forward", "generate", "chat", "stream_chat"))
    draw = {"forward": draw_forward, "generate": draw_generate}.get(kind, draw_chat)
    allowed = CLEAR if "chat" in kind else FROM_TORCH
    options, seed = draw(rng, model), rng.randrange(2**31)

    def call() -> Any:
        torch.manual_seed(seed)
        if kind == "forward":
            return call_forward(model, options)
        if kind == "generate":
            return call_generate(model, options)
        return call_chat(model, options, tokenizer, kind == "stream_chat")

    try:
        fast = try_call(call, allowed)
        with model_kernels_off():
            slow = try_call(call, allowed)
        # Packed weights round their inputs in kernels, and bfloat16 rounds everywhere.
        is_exact = place < 4 and not options.get("do_sample")
        return (compare(fast, slow, model.dtype) if is_exact else compare_kinds(fast, slow)), ""
    except Exception as error:
        what = str(error) if isinstance(error, Finding) else f"{type(error).__name__}: {error}"
        return "found", f"{show_call(kind, place, options)}: {what[:400]}"


def compare_kinds(fast: Any, slow: Any) -> str:
    """Return how both ended, where rounding may part them."""
    if isinstance(fast, Exception) != isinstance(slow, Exception):
        raise Finding(f"kernels: {_show(fast)}; plain torch: {_show(slow)}")
    return "refused" if isinstance(fast, Exception) else "right"


def model_kernels_off() -> Any:
    """Return the context in which plain torch does everything."""
    return importlib.import_module(f"{chatglm.model.__name__}.environment_chatglm").kernels_off()


def make_calls(models: list[Any], tokenizer: Any, seed: int) -> Tally:
    """Make some calls in this process."""
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    findings = []
    for number in range(CALLS):
        word, text = make_call(models, tokenizer, random.Random(f"{seed} {number}"))
        counts[word] += 1
        findings += [text] if text else []
    return counts, findings


def prepare() -> Case:
    """Make the models."""
    torch.set_num_threads(1)  # forks have no other threads
    models, tokenizer = make_models(), AutoTokenizer.from_pretrained(ROOT)
    for model in models:
        model.generation_config.max_length = None

    def case(rng: random.Random) -> Tally:
        task = functools.partial(make_calls, models, tokenizer, rng.randrange(2**31))
        tally = run_apart(task, SECONDS)
        if isinstance(tally, Raised):
            raise Finding(f"{tally.kinds[0]}: {tally.message} {tally.trace}")
        return tally

    return case


CAMPAIGN = Campaign(
    "calls",
    "Random calls of forward, generate, chat, stream_chat",
    "calls",
    100_000,
    CALLS,
    prepare,
)
