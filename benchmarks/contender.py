"""Our model as a contender of `benchmarks.serving`: random, of the 6B shape, on the CPU.

python -m benchmarks.contender [--bits 4] [--dtype float32] [--layers 28] [--alone] [--threads N]
"""

import argparse
import os
from typing import Any

import torch
import transformers

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


class Contender:
    """A random model and how long its phases take.

    Args:
        recipe: what model.
        threads: of torch.
    """

    def __init__(self, recipe: Recipe, threads: int) -> None:
        if recipe.alone:
            leave_engine_out()
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        # Counted before there are values: kernels may keep weights in other forms.
        self.step_bytes = count_step_bytes(outline_model(recipe))
        self.model = make_model(recipe)
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


def main() -> None:
    """Serve a model."""
    parser = argparse.ArgumentParser(description="Our model as a contender.")
    add_recipe_options(parser)
    parser.add_argument("--alone", action="store_true", help="the model's files, no engine")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    serve(lambda: Contender(read_recipe(args), args.threads))


if __name__ == "__main__":
    main()
