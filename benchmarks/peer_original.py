"""The original code as a contender: `benchmarks.serving` around a folder that the user has.

    PYTHON -m benchmarks.peer_original DIR [--layers 28] [--threads N] [--train lora]

DIR is a folder of THUDM's chatglm-6b-int4 without the weights: its Python files, config.json and,
on a CPU without a ready kernel, what it compiles one from. PYTHON has transformers 4.30 and what
the folder's files import, and peft for `--train lora` and `qlora`. The model is made by its own
classes on this machine and filled with the random numbers of `full_size`'s kind; its matrices are
INT4, or float32 for `--train full` and `lora`.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.serving import serve

DEVIATION = 0.02
LARGEST = 7


class Original:
    """The original model with so many blocks, in float32 around INT4 matrices as on its CPU path.

    Args:
        folder: of its code and configuration.
        layers: blocks.
        threads: of torch; its own kernel takes its own number.
        method: "full", "lora" or "qlora" for a model in training.
        vocabulary: tokens of that.
    """

    def __init__(
        self, folder: Path, layers: int, threads: int, method: str = "", vocabulary: int = 0
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoModel

        torch.set_num_threads(threads)
        self.torch: Any = torch
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config.num_layers = layers
        config.quantization_bit = 0 if method in ("full", "lora") else 4
        config.vocab_size = vocabulary or config.vocab_size
        model: Any = AutoModel.from_config(config, trust_remote_code=True)
        self.model: Any = model.float().eval()
        self._fill()
        self.step: Any = None
        if method in ("lora", "qlora"):
            self._adapt()

    def _fill(self) -> None:
        """Give packed matrices random bytes, and the rest values that keep activations finite."""
        for name, tensor in self.model.state_dict().items():
            if tensor.dtype == self.torch.int8:
                tensor.random_(-128, 128)
            elif name.endswith("weight_scale"):
                tensor.fill_(3 * DEVIATION / LARGEST)
            elif tensor.dim() == 2:
                tensor.normal_(0, DEVIATION)

    def _adapt(self) -> None:
        """Freeze the model and add adapters as the other contenders have them."""
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["query_key_value"])
        self.model = get_peft_model(self.model, adapters)

    def train(self, length: int, batch: int) -> dict[str, Any]:
        """Return the seconds of a training step, and the most bytes that were in use so far."""
        from chatglm.benching.training import TrainingStep, draw_rows
        from chatglm.process_memory import read_peak

        if self.step is None:
            rows = draw_rows(self._markers(), length, batch, self.torch.device("cpu"))
            self.step = TrainingStep(self.model, rows)
        return {"seconds": self.step.run(), "peak": read_peak()}

    def _markers(self) -> Any:
        """Return the special tokens, moved into a vocabulary that is smaller than the folder's."""
        config = self.model.config
        last = config.vocab_size
        names = ("mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id")
        if config.eos_token_id >= last:
            for number, name in enumerate(names):
                setattr(config, name, last - len(names) + number)
        return config

    def describe(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        import transformers

        versions = f"torch {self.torch.__version__}, transformers {transformers.__version__}"
        return {"versions": versions, "threads": self.torch.get_num_threads()}

    def prefill(self, tokens: int, batch: int = 1) -> dict[str, Any]:
        """Return the seconds from a prompt of so many tokens to the first of its answer."""
        began = time.perf_counter()
        self._run(self._draw(tokens, batch), None)
        return {"seconds": time.perf_counter() - began}

    def decode(self, context: int, tokens: int, batch: int = 1) -> dict[str, Any]:
        """Return the seconds of each of so many tokens behind a prompt that it reads first."""
        ids = self._draw(context, batch)
        output, seconds = self._run(ids, None), []
        for _ in range(tokens + 1):  # the first finds the processor's caches cold
            began = time.perf_counter()
            chosen = output.logits[:, -1].argmax(-1, keepdim=True)
            ids = self.torch.cat((ids, chosen), dim=1)
            output = self._run(ids, output.past_key_values)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds[1:]}

    def _draw(self, tokens: int, batch: int) -> Any:
        config = self.model.config
        plain = self.torch.randint(4, 100000, (batch, tokens - 2))
        ends = self.torch.tensor([[config.gmask_token_id, config.bos_token_id]]).expand(batch, 2)
        return self.torch.cat((plain, ends), dim=1)

    def _run(self, ids: Any, past: Any) -> Any:
        """Do a forward pass with what the model's own preparation of inputs makes of the ids."""
        with self.torch.no_grad():
            inputs = self.model.prepare_inputs_for_generation(ids, past=past)
            return self.model(**inputs, use_cache=True, return_dict=True)


def main() -> None:
    """Serve the original code."""
    parser = argparse.ArgumentParser(description="The original code as a contender.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--train", choices=("full", "lora", "qlora"), default="")
    parser.add_argument("--vocabulary", type=int, default=0, help="tokens (the folder's)")
    args = parser.parse_args()
    sizes = (args.layers, args.threads, args.train, args.vocabulary)
    serve(lambda: Original(args.folder, *sizes))


if __name__ == "__main__":
    main()
