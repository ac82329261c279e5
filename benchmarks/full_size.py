"""Makes a model of the 6B shape out of random numbers, in seconds, in memory or as a folder.

    python -m benchmarks.full_size FOLDER [--layers 28] [--bits 4] [--group-size 32] [--embeddings]

Only sizes count for speed, so one block of random weights fills every matrix over and over. Scales
and deviations are such that activations stay finite. Built on the meta device and filled in place:
no more memory is taken than the model has.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from chatglm.model_files import find_model_files

ROOT = Path(__file__).resolve().parent.parent
PRESET = ROOT / "chatglm" / "presets" / "chatglm-6b"
TOKENIZER_FILES = ("ice_text.model", "tokenizer_config.json", "generation_config.json")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id", "pad_token_id")
DEVIATION = 0.02
LARGEST = {4: 7, 8: 127}  # the largest of the integers that stand for three deviations
PATTERN = 2**22  # random numbers that are repeated
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Recipe(NamedTuple):
    """What random model to make.

    Attributes:
        bits: 4 or 8 for packed weights; 0 for plain ones.
        group_size: columns that share a scale; None for whole rows.
        embeddings: whether the embedding and the head are packed too.
        dtype: "float32", "float16" or "bfloat16", of all that is not packed.
        layers: number of blocks.
        hidden: width of the model; others than 4096 keep the shape of heads and vocabulary.
        alone: whether the model's files have to do without the package's engine.
    """

    bits: int = 4
    group_size: int | None = None
    embeddings: bool = False
    dtype: str = "float32"
    layers: int = 28
    hidden: int = 4096
    alone: bool = False

    def __str__(self) -> str:
        name = f"INT{self.bits}" if self.bits else "plain"
        group = f" g{self.group_size}" if self.group_size else ""
        embeddings = " + embeddings" if self.embeddings else ""
        return f"{name}{group}{embeddings}, {self.dtype}{', files alone' if self.alone else ''}"


def leave_engine_out() -> None:
    """Let nothing in this process import the engine, as where only the model's files are."""
    sys.modules["chatglm.cpu"] = cast(Any, None)


def load_class(reference: str) -> Any:
    """Return a class of the model files, as transformers loads them."""
    return get_class_from_dynamic_module(reference, str(ROOT))


def read_config(recipe: Recipe) -> dict[str, Any]:
    """Return the configuration of the 6B model with the recipe's sizes."""
    config = json.loads((PRESET / "config.json").read_text(encoding="utf-8"))
    config |= {"num_layers": recipe.layers, "hidden_size": recipe.hidden}
    config["inner_hidden_size"] = 4 * recipe.hidden
    config["num_attention_heads"] = max(2, recipe.hidden // 128)
    return config


def outline_model(recipe: Recipe, config: dict[str, Any] | None = None) -> Any:
    """Return the model on the meta device: sizes without values."""
    model_class = load_class("modeling_chatglm.ChatGLMForConditionalGeneration")
    fields = config or read_config(recipe)
    settings = load_class("configuration_chatglm.ChatGLMConfig").from_dict(fields)
    with torch.device("meta"):
        model = model_class._from_config(settings, dtype=DTYPES[recipe.dtype])
        model.tie_weights()
        if recipe.bits:
            model.quantize(
                recipe.bits,
                empty_init=True,
                group_size=recipe.group_size,
                embeddings=recipe.embeddings,
            )
    return model.eval()


def make_model(recipe: Recipe, config: dict[str, Any] | None = None) -> Any:
    """Return a random model on the CPU, ready to generate; its answers never end by themselves."""
    model = outline_model(recipe, config)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    fill_model(model, recipe.bits)
    model.generation_config.eos_token_id = None
    return model


def fill_model(model: nn.Module, bits: int) -> None:
    """Give every parameter random or neutral values, in place."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-128, 128, (PATTERN,), generator=generator, dtype=torch.int8)
    normals = torch.randn(PATTERN, generator=generator).mul_(DEVIATION)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_scale"):
                parameter.fill_(3 * DEVIATION / LARGEST[bits])
            elif parameter.dim() == 2:
                repeat_into(parameter, normals if parameter.is_floating_point() else integers)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)


def repeat_into(tensor: Tensor, pattern: Tensor) -> None:
    """Fill a contiguous tensor with a shorter one over and over."""
    pattern = pattern.to(tensor.dtype)
    for part in tensor.view(-1).split(pattern.numel()):
        part.copy_(pattern[: part.numel()])


def copy_code(folder: Path) -> None:
    """Copy the model files."""
    for name in find_model_files(ROOT):
        shutil.copy(ROOT / name, folder)


def save_folder(folder: Path, recipe: Recipe) -> int:
    """Write a random model as a folder with this repository's vocabulary; return its bytes.

    The special ids are those of that vocabulary, and the head is silent for ids beyond it, so that
    what the model answers can be decoded.
    """
    own = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    config = read_config(recipe) | {name: own[name] for name in SPECIAL_IDS}
    model = make_model(recipe, config)
    with torch.no_grad():
        model.lm_head.weight[own["vocab_size"] :] = 0
    model.save_pretrained(folder)
    copy_code(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / name, folder)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields["auto_map"] = own["auto_map"]
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that make a recipe."""
    add = parser.add_argument
    add("--layers", type=int, default=28, help="blocks (28)")
    add("--bits", type=int, default=4, choices=(0, 4, 8), help="of packed weights; 0: plain (4)")
    add("--group-size", type=int, choices=(32, 64, 128), help="columns that share a scale (a row)")
    add("--embeddings", action="store_true", help="pack the embedding and the head too")
    add("--dtype", default="float32", choices=DTYPES, help="of what is not packed (float32)")
    add("--hidden", type=int, default=4096, help="width of the model (4096)")


def read_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe that the options name."""
    given = vars(args)
    return Recipe(**{name: given[name] for name in Recipe._fields if name in given})


def main() -> int:
    """Write a random model to a folder."""
    parser = argparse.ArgumentParser(description="Write a random model of the 6B shape.")
    parser.add_argument("folder", type=Path)
    add_recipe_options(parser)
    args = parser.parse_args()
    if args.folder.exists():
        print(f"full_size: {args.folder} is there already: name a new folder", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True)
    print(f"{args.folder}: {save_folder(args.folder, read_recipe(args)) / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
