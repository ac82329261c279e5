"""Our model as a contender of `benchmarks.serving`: random, of the 6B shape, on the CPU.

python -m benchmarks.contender [--bits 4] [--dtype float32] [--layers 28] [--alone] [--copies]
    [--threads N]
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
import transformers

from benchmarks.copying import draw_text, make_copier
from benchmarks.full_size import (
    Recipe,
    add_recipe_options,
    leave_engine_out,
    load_class,
    make_model,
    outline_model,
    read_recipe,
)
from benchmarks.serving import serve
from chatglm.benching.measuring import (
    count_position_bytes,
    count_step_bytes,
    draw_prompt,
    never_end,
    time_answer,
    time_tokens,
)
from chatglm.benching.rows import make_row, time_products, time_rows
from chatglm.model_modules import import_model_module


class Contender:
    """A random model and how long its phases take.

    Args:
        recipe: what model.
        threads: of torch.
        copies: whether the model copies (`copying`).
    """

    def __init__(self, recipe: Recipe, threads: int, copies: bool = False) -> None:
        if recipe.alone:
            leave_engine_out()
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        # Counted before there are values: kernels may keep weights in other forms.
        self.step_bytes = count_step_bytes(outline_model(recipe))
        self.model = make_model(recipe)
        self.period = make_copier(self.model) if copies else 0
        self.made: dict[int, list[Any]] = {}
        never_end(self.model)

    def describe(self) -> dict[str, Any]:
        """Return what the figures depend on, and the bytes that a step reads."""
        return {
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "threads": torch.get_num_threads(),
            "engine": load_class("environment_chatglm.find_engine")() is not None,
            "step_bytes": self.step_bytes,
            "kv_bytes": count_position_bytes(self.model),
        }

    def prefill(self, tokens: int, batch: int = 1) -> dict[str, Any]:
        """Return the seconds from prompts of so many tokens to the first of each answer."""
        seconds = time_answer(self.model, draw_prompt(self.model, tokens, batch), 1)
        return {"seconds": seconds[0]}

    def decode(
        self, context: int, tokens: int, batch: int = 1, top_p: float | None = None
    ) -> dict[str, Any]:
        """Return the seconds of each of so many tokens behind a context."""
        options = {"do_sample": True, "top_p": top_p, "top_k": 0} if top_p else {}
        return {"seconds": time_tokens(self.model, context, tokens, batch, **options)}

    def rows(self, contexts: Sequence[int], tokens: int) -> dict[str, Any]:
        """Return the seconds of each of so many steps of rows behind these contexts."""
        for context, count in Counter(contexts).items():
            made = self.made.setdefault(context, [])
            made += [make_row(self.model, context) for _ in range(count - len(made))]
        left = {context: list(rows) for context, rows in self.made.items()}
        rows = [left[context].pop() for context in contexts]
        return {"seconds": time_rows(self.model, rows, tokens)}

    def products(self, tokens: int) -> dict[str, Any]:
        """Return the seconds of all blocks' products for so many tokens, and of nothing else."""
        engine = load_class("environment_chatglm.find_engine")()
        with nullcontext() if engine is None else engine.fast_products():
            return {"seconds": time_products(self.model, tokens)}

    def look_up(self, context: int, tokens: int, text: str, drafts: int) -> dict[str, Any]:
        """Return the seconds of an answer beyond its first token, and its ids.

        Args:
            context: tokens of the prompt.
            tokens: of the answer, beyond the first.
            text: of the prompt, one of `copying.TEXTS`.
            drafts: tokens that are looked up at once; 0 for none.
        """
        prompt = draw_text(self.model, context, text, self.period)[0].tolist()
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens + 1}
        if drafts:
            options["prompt_lookup_num_tokens"] = drafts
        seconds, ids = self._stream(prompt, options)
        return {"seconds": sum(seconds), "ids": ids}

    def answer(self, context: int, tokens: int, top_p: float | None = None) -> dict[str, Any]:
        """Return the seconds of each of so many tokens behind a context, as `chat` decodes them."""
        options = {"do_sample": bool(top_p), "top_p": top_p, "max_new_tokens": tokens + 1}
        prompt = draw_prompt(self.model, context)[0]
        return {"seconds": self._stream(cast(Any, prompt).tolist(), options)[0]}

    def _stream(self, prompt: list[int], options: dict[str, Any]) -> tuple[list[float], list[int]]:
        """Return the seconds of each step of an answer beyond the first token, and its ids."""
        decoding = import_model_module(self.model, "decoding_chatglm")
        stream = decoding.stream_answer(self.model, prompt, options)
        # The first token comes with the prompt, whose time is not what is asked for.
        answer = next(stream)  # and the same, with more tokens, after every step
        times = [time.perf_counter(), *(time.perf_counter() for _ in stream)]
        return [after - before for before, after in pairwise(times)], answer.answer_ids


def main() -> None:
    """Serve a model."""
    parser = argparse.ArgumentParser(description="Our model as a contender.")
    add_recipe_options(parser)
    parser.add_argument("--alone", action="store_true", help="the model's files, no engine")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--copies", action="store_true", help="a model that copies its prompt")
    args = parser.parse_args()
    serve(lambda: Contender(read_recipe(args), args.threads, args.copies))


if __name__ == "__main__":
    main()
