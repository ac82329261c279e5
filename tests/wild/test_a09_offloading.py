"""A9: a model whose weights accelerate keeps elsewhere answers as ever.

Inputs were sent to `model.device`, which is "meta" while the first weights lie on a disk:
"Tensor.item() cannot be called on meta tensors".
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import accelerate.hooks
import pytest
import torch
import transformers
from chatglm_6b.environment_chatglm import find_input_device
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from scripted_model import embedded_model, embedded_tokenizer

# transformers 4 advises to send the ids to "meta".
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate.. with the")

QUESTION = "What is water?"
BRIEF: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
TIED = "transformer.word_embeddings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as safetensors, from which a disk can be read in place."""
    path = tmp_path_factory.mktemp("offloaded") / "model"
    embedded_model().save_pretrained(path)
    return path


def on_cpu(path: Path) -> Any:
    model = copy.deepcopy(embedded_model())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def on_disk(path: Path) -> Any:
    model = copy.deepcopy(embedded_model())
    accelerate.disk_offload(model, str(path / "weights"), execution_device=torch.device("cpu"))
    return model


def mapped(*names: str) -> Callable[[Path], Any]:
    """Load with some modules on the disk and all others on the processor."""

    def load(path: Path) -> Any:
        parts = ["transformer.word_embeddings", "transformer.final_layernorm", "lm_head"]
        parts += ["transformer.rotary_emb", *(f"transformer.layers.{i}" for i in range(8))]
        device_map = {part: "disk" if part in names else "cpu" for part in parts}
        return ChatGLMForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, device_map=device_map, offload_folder=str(path / "spilled")
        ).eval()

    return load


tied_to_disk = mapped(TIED, "lm_head")


def quantized(path: Path) -> Any:
    model = copy.deepcopy(embedded_model()).quantize(8)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize(
    "spread",
    [on_cpu, on_disk, tied_to_disk, mapped("transformer.layers.3"), quantized],
    ids=["cpu", "disk", "mapped_embeddings", "mapped_block", "quantized"],
)
def test_offloaded_models_answer(spread: Callable[[Path], Any], folder: Path) -> None:
    if spread is tied_to_disk and Version(transformers.__version__) < Version("5"):
        pytest.skip("transformers 4 looks for a tied head on the disk by a name that is not there")
    model, tokenizer = spread(folder), embedded_tokenizer()
    same = copy.deepcopy(embedded_model()).quantize(8) if spread is quantized else embedded_model()
    wanted = same.chat(tokenizer, QUESTION, **BRIEF)
    assert model.chat(tokenizer, QUESTION, **BRIEF) == wanted
    assert list(model.stream_chat(tokenizer, QUESTION, **BRIEF))[-1] == wanted
    inputs = tokenizer(QUESTION, return_tensors="pt")
    assert torch.equal(model.generate(**inputs, **BRIEF), same.generate(**inputs, **BRIEF))
    assert str(find_input_device(model)) == "cpu"


# peft says the old names of checkpointing, for which transformers 5.23 has new ones.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_adapters_over_offloaded_weights() -> None:
    model, tokenizer = on_cpu(Path()), embedded_tokenizer()
    wanted = embedded_model().chat(tokenizer, QUESTION, **BRIEF)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["word_embeddings"])).eval()
    assert wrapped.device.type == "meta"
    assert str(find_input_device(wrapped)) == "cpu"
    wrapped = get_peft_model(on_cpu(Path()), LoraConfig(r=2)).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:  # peft makes them where the weights are
            module = wrapped.get_submodule(name.rpartition(".")[0])
            module.weight = torch.nn.Parameter(torch.zeros_like(parameter, device="cpu"))
    assert wrapped.chat(tokenizer, QUESTION, **BRIEF) == wanted


def test_a_hook_of_several_parts() -> None:
    model = copy.deepcopy(embedded_model())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    embedding = model.get_input_embeddings()
    accelerate.hooks.add_hook_to_module(embedding, accelerate.hooks.ModelHook(), append=True)
    assert str(find_input_device(model)) == "cpu"
    assert str(find_input_device(embedded_model())) == "cpu"
