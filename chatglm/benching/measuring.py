"""Owns measuring: the seconds of a model's two phases, a device's memory, and what both depend on.

The phases, reading a prompt and giving one token after the other, both go through `generate`, so
that what is timed is what a user waits for. Prompts are random ids: speed does not depend on the
words. Does not know where a model comes from, nor what is done with the seconds.

Shapes: `B` batch, `S` tokens of a prompt, `N` heads, `D` head dim.
"""

import os
import platform
import time
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from chatglm.process_memory import read_peak

# The ids below this one are the vocabulary's own markers, which no prompt has inside.
FIRST_PLAIN_ID = 4
# Every prompt ends with two tokens, [gMASK] and <sop>.
MARKERS = 2


class TokenClock(BaseStreamer):
    """Notes when `generate` hands on the prompt and each token.

    Attributes:
        times: seconds of `time.perf_counter`, the prompt's first.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token was noted."""

    def intervals(self) -> list[float]:
        """Return the seconds from each note to the next; the first is the prompt's."""
        return [after - before for before, after in zip(self.times, self.times[1:])]


def draw_prompt(model: Any, length: int, batch_size: int = 1) -> Tensor:
    """Return random prompts `(B, S)` that end as GLM's prompts do.

    Raises:
        ValueError: for a length that has no room for a token and the two markers at the end.
    """
    if length <= MARKERS:
        raise ValueError(f"a prompt has 3 tokens or more, got {length}")
    config = model.config
    markers = torch.tensor([config.gmask_token_id, config.bos_token_id])
    generator = torch.Generator().manual_seed(length)
    last = min(config.gmask_token_id, config.mask_token_id)
    size = (batch_size, length - MARKERS)
    plain = torch.randint(FIRST_PLAIN_ID, last, size, generator=generator)
    prompt = torch.cat((plain, markers.expand(batch_size, -1)), dim=1)  # (B, S)
    return prompt.to(model.device)


def time_answer(model: Any, input_ids: Tensor, tokens: int, **options: Any) -> list[float]:
    """Generate so many tokens behind a prompt `(B, S)`, and return the seconds of each.

    Args:
        model: whose answers the end token does not end.
        input_ids: the prompt.
        tokens: of the answer.
        options: for `generate`; greedy by default.
    """
    clock = TokenClock()
    options = {"do_sample": False, "streamer": clock, "max_new_tokens": tokens} | options
    model.generate(input_ids, **options)
    seconds = clock.intervals()
    if len(seconds) != tokens:
        raise ValueError(f"the answer ended after {len(seconds)} of {tokens} tokens")
    return seconds


def never_end(model: Any) -> None:
    """Let answers have any length that is asked for, whatever the model says."""
    model.generation_config.eos_token_id = None
    model.generation_config.max_length = None


def fill_cache(model: Any, length: int, batch_size: int = 1) -> Any:
    """Return a cache of the model's own kind with random states of a prompt in it.

    Reading a prompt gives the same cache, in more time.

    Args:
        model: the model.
        length: tokens in the cache.
        batch_size: rows.
    """
    begin = draw_prompt(model, MARKERS + 1, batch_size)
    output = model.generate(
        begin, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, use_cache=True
    )
    # transformers before 5.24 has the other name, and 5.24 calls it deprecated.
    cache = output["cache"] if "cache" in output else output["past_key_values"]
    add_states(model, cache, length, batch_size)
    return cache


def add_states(model: Any, cache: Any, length: int, batch_size: int = 1) -> None:
    """Put random states into a cache of the model until it holds so many tokens."""
    config = model.config
    missing = length - int(cache.get_seq_length())
    size = (batch_size, config.num_attention_heads, missing, config.head_dim)  # (B, N, S, D)
    states = torch.randn(size, device=model.device, dtype=model.dtype)
    for layer_idx in range(config.num_layers if missing > 0 else 0):
        cache.update(states, states, layer_idx)


def time_tokens(
    model: Any, context: int, tokens: int, batch_size: int = 1, **options: Any
) -> list[float]:
    """Return the seconds of each of so many tokens behind a context that is in the cache.

    Args:
        model: whose answers the end token does not end.
        context: tokens of the prompt, 3 or more.
        tokens: that are timed; one before them finds the processor's caches cold, and is not.
        batch_size: rows, each with its own prompt.
        options: for `generate`; greedy by default.
    """
    cache = fill_cache(model, context, batch_size)
    prompt = draw_prompt(model, context, batch_size)
    input_ids = torch.cat((prompt, prompt[:, :1]), dim=1)  # (B, S + 1)
    return time_answer(model, input_ids, tokens + 1, past_key_values=cache, **options)[1:]


def count_step_bytes(model: Any) -> int:
    """Return the bytes of weights that one decoding step reads: all but the embedding's rows.

    A head that shares the embedding's table reads it as a whole.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return sum(t.nbytes for name, t in tensors.items() if ".word_embeddings." not in name)


def count_position_bytes(model: Any) -> int:
    """Return the bytes of keys and values that a position of context adds to a step."""
    return 2 * model.config.num_layers * model.config.hidden_size * model.dtype.itemsize


def read_device_peak(device: torch.device) -> int:
    """Return the most bytes that were in use on a GPU, or by the process; 0 if not known."""
    is_gpu = device.type == "cuda"
    return torch.cuda.max_memory_allocated(device) if is_gpu else read_peak()


def list_versions() -> dict[str, str]:
    """Return what the figures depend on: releases, and the processor."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
    }
