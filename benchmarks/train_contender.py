"""Contenders of `benchmarks.bench_train`: our model and a plain one of the same shape, in training.

    python -m benchmarks.train_contender ours --method lora [--layers 2] [--vocabulary 8192]
    python -m benchmarks.train_contender plain --method qlora [--device cuda] [--half]

The plain model is what one writes with torch's own modules and peft: linear layers, layer norms,
`scaled_dot_product_attention`, cross entropy. Its packed weights are unpacked by torch in every
forward pass, and autograd keeps what they were unpacked to.

Shapes: `B` rows, `S` tokens, `N` heads, `D` head dim, `H` hidden.
"""

import argparse
import math
import os
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.full_size import Recipe, fill_model, make_model, read_config
from benchmarks.serving import serve
from chatglm.benching.command import METHODS
from chatglm.benching.measuring import read_device_peak
from chatglm.benching.training import RANK, TrainingStep, draw_rows
from chatglm.training.data.batches import find_learned
from chatglm.training.data.rendering import IGNORED_LABEL

TARGET = "query_key_value"
ROTARY_BASE = 10000.0
ALPHA = math.sqrt(2 * 28)
BITS = 4


class Setting(NamedTuple):
    """What is trained and how.

    Attributes:
        method: "full", "lora" or "qlora".
        layers: blocks.
        vocabulary: tokens of it.
        hidden: width of the model.
        half: whether products are computed in bfloat16.
        device: "cpu" or "cuda".
        checkpointing: whether blocks are computed again in the backward pass.
    """

    method: str
    layers: int
    vocabulary: int
    hidden: int
    half: bool
    device: str
    checkpointing: bool

    @property
    def recipe(self) -> Recipe:
        """The model; what is not trained is held in the format that is computed in."""
        is_half = self.half and self.method != "full"
        dtype = "bfloat16" if is_half else "float32"
        bits = BITS if self.method == "qlora" else 0
        return Recipe(bits=bits, dtype=dtype, layers=self.layers, hidden=self.hidden)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, with markers at the end of a vocabulary of any size."""
        last = self.vocabulary
        names = ("mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id")
        ids = {name: last - len(names) + number for number, name in enumerate(names)}
        return read_config(self.recipe) | {"vocab_size": last} | ids


def build_ours(setting: Setting) -> nn.Module:
    """Return our model, as `chatglm train` would have it."""
    from chatglm.training.models import add_adapters
    from chatglm.training.settings import Settings

    model: Any = make_model(setting.recipe, setting.config).to(setting.device)
    model.config.use_cache = False
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.method == "full":
        return model
    return add_adapters(model, Settings(lora_rank=RANK), "CAUSAL_LM")


class UnpackedLinear(nn.Linear):
    """A linear layer with 4-bit weights that plain torch unpacks whenever it is called."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, dtype=dtype)
        packed = torch.zeros(out_features, in_features // 2, dtype=torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        scale = torch.zeros(out_features, dtype=dtype)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        even, odd = self.weight >> 4, ((self.weight & 15) ^ 8) - 8
        integers = torch.stack((even, odd), dim=-1).flatten(1)
        weight = integers.to(self.weight_scale.dtype) * self.weight_scale.unsqueeze(1)
        return nn.functional.linear(input.to(weight.dtype), weight, self.bias)


class PlainBlock(nn.Module):
    """One layer of the architecture out of torch's own modules."""

    def __init__(self, config: dict[str, Any], linear: Any, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["inner_hidden_size"]
        self.head_dim = hidden // config["num_attention_heads"]
        self.input_layernorm = nn.LayerNorm(hidden, dtype=dtype)
        self.query_key_value = linear(hidden, 3 * hidden, dtype=dtype)
        self.dense = linear(hidden, hidden, dtype=dtype)
        self.post_attention_layernorm = nn.LayerNorm(hidden, dtype=dtype)
        self.dense_h_to_4h = linear(hidden, inner, dtype=dtype)
        self.dense_4h_to_h = linear(inner, hidden, dtype=dtype)

    def forward(self, hidden_states: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the new `(B, S, H)`; `mask` is `(B, 1, S, S)`, `cos` and `sin` `(S, D)`."""
        states = self.input_layernorm(hidden_states)
        mixed = self.query_key_value(states).unflatten(-1, (-1, 3 * self.head_dim))
        query, key, value = mixed.transpose(1, 2).chunk(3, dim=-1)  # (B, N, S, D)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states * ALPHA + self.dense(attended.transpose(1, 2).flatten(2))
        states = self.post_attention_layernorm(states)
        widened = nn.functional.gelu(self.dense_h_to_4h(states), approximate="tanh")
        return states * ALPHA + self.dense_4h_to_h(widened)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys, each half of a head by a position of its own."""
    a, b, c, d = states.chunk(4, dim=-1)
    return states * cos + torch.cat((-b, a, -d, c), dim=-1) * sin


class Loss(NamedTuple):
    """What a training step reads."""

    loss: Tensor


class PlainModel(nn.Module):
    """The whole model out of torch's own modules.

    Args:
        setting: what is trained and how.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        config, recipe = setting.config, setting.recipe
        dtype = getattr(torch, recipe.dtype)
        linear: Any = UnpackedLinear if recipe.bits else nn.Linear
        self.bos_id, self.checkpointing = config["bos_token_id"], setting.checkpointing
        self.embedding = nn.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype)
        blocks = (PlainBlock(config, linear, dtype) for _ in range(recipe.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config["hidden_size"], dtype=dtype)
        self.head_dim = config["hidden_size"] // config["num_attention_heads"]

    def forward(self, input_ids: Tensor, labels: Tensor) -> Loss:
        """Return the loss of rows `(B, S)` that all turn from context to answer at one place."""
        border = int((input_ids[0] == self.bos_id).nonzero()[0])
        hidden_states = self.embedding(input_ids)
        shape = (input_ids.shape[1], border, hidden_states)
        mask, (cos, sin) = self._mask(*shape), self._angles(*shape)
        for block in self.blocks:
            if self.checkpointing:
                arguments = (hidden_states, mask, cos, sin)
                hidden_states = checkpoint(block, *arguments, use_reentrant=False)
            else:
                hidden_states = block(hidden_states, mask, cos, sin)
        logits = nn.functional.linear(self.norm(hidden_states), self.embedding.weight)
        logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        return Loss(nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL))

    def _mask(self, length: int, border: int, states: Tensor) -> Tensor:
        """Return True where a token may look: back, and at all of the context."""
        columns = torch.arange(length, device=states.device)
        is_seen = (columns <= columns.unsqueeze(1)) | (columns < border)
        return is_seen.expand(states.shape[0], 1, -1, -1)

    def _angles(self, length: int, border: int, states: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.arange(length, device=states.device)
        positions = (columns.clamp(max=border - 1), (columns - border + 1).clamp(min=0))
        width = self.head_dim // 2
        exponents = torch.arange(0, width, 2, device=states.device) / width
        angles = [torch.outer(p, ROTARY_BASE**-exponents).repeat(1, 2) for p in positions]
        both = torch.cat(angles, dim=-1)
        return both.cos().to(states.dtype), both.sin().to(states.dtype)


def build_plain(setting: Setting) -> nn.Module:
    """Return the plain model, with peft's adapters where only those are trained."""
    from peft import LoraConfig, get_peft_model

    model = PlainModel(setting)
    fill_model(model, setting.recipe.bits)
    model.to(setting.device)
    if setting.method == "full":
        return model
    adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[TARGET])
    return get_peft_model(model, adapters)  # type: ignore[arg-type]


BUILDERS = {"ours": build_ours, "plain": build_plain}


class Trainee:
    """A model in training.

    Args:
        name: "ours" or "plain".
        setting: what is trained and how.
        threads: of torch.
    """

    def __init__(self, name: str, setting: Setting, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.keeps_learned = name == "ours"  # as `chatglm train sft` does
        self.setting, self.model = setting, BUILDERS[name](setting)
        self.step: TrainingStep | None = None

    def describe(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        return {"versions": versions, "threads": torch.get_num_threads()}

    def train(self, length: int, batch: int) -> dict[str, Any]:
        """Return the seconds of a step, and the most bytes that were in use so far.

        The rows are drawn by the first call, which also makes the optimizer's states.
        """
        device = torch.device(self.setting.device)
        if self.step is None:
            config = argparse.Namespace(**self.setting.config)
            rows = draw_rows(config, length, batch, device)
            if self.keeps_learned:
                rows["logits_to_keep"] = find_learned(rows["labels"])
            half = torch.bfloat16 if self.setting.half else None
            self.step = TrainingStep(self.model, rows, half)
        return {"seconds": self.step.run(), "peak": read_device_peak(device)}


def make_parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description="A model in training.")
    add = parser.add_argument
    add("name", choices=BUILDERS)
    add("--method", choices=METHODS, required=True)
    add("--layers", type=int, default=2)
    add("--vocabulary", type=int, default=8192)
    add("--hidden", type=int, default=4096)
    add("--half", action="store_true", help="compute in bfloat16")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--checkpointing", action="store_true")
    add("--threads", type=int, default=os.cpu_count() or 1)
    return parser


def main() -> None:
    """Serve a model."""
    args = make_parser().parse_args()
    setting = Setting(**{name: getattr(args, name) for name in Setting._fields})
    serve(lambda: Trainee(args.name, setting, args.threads))


if __name__ == "__main__":
    main()
