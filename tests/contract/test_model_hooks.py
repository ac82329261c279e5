"""What the network, its loading and its kernels lean on in other libraries, each hook by its name.

A hook that is renamed fails here by that name, which is the test's id: where its loss would be
silent its effect is asked for, where it is loud the name. docs/hooks.md has a row for each, and
`test_hooks` compares the two. Generation and tokenizer are in `test_generation_hooks`, what the
training leans on in `test_training_hooks`.
"""

import copy
import importlib
import itertools
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from chatglm_6b import cache_chatglm, environment_chatglm
from chatglm_6b.cache_chatglm import ChatGLMCache, ReservedLayer
from chatglm_6b.checkpoint_chatglm import LatePatterns
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.environment_chatglm import CACHE_NAME, CACHE_NAMES, find_input_device
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration, GLMBlock
from chatglm_6b.quantization import QuantizedLinear, TorchKernels, allocate_product
from chatglm_6b.quantization_torch import find_int4_block_rows
from chatglm_6b.quantizer_chatglm import ChatGLMQuantizer, QuantizedLoadingMixin, register
from conftest import (
    TINY,
    build_model,
    count_calls,
    forget_kernels,
    import_from_package,
    leave_engine_out,
)
from packaging.version import Version
from peft import IA3Config, LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

# peft asks for an attribute by the name that it had before 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

IS_OLD = Version(transformers.__version__) < Version("5")
ENGINE = ("chatglm.cpu.compiler", "chatglm.cpu.kernel_cache")
IDS = torch.tensor([[5, 197, 86, 97, 5, 197, 11, 301, 304]])


# Names whose loss is loud


@pytest.mark.parametrize(
    "hook",
    [
        "modeling_utils.ALL_ATTENTION_FUNCTIONS",
        "modeling_utils.load_state_dict",
        "quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING",
        "quantizers.auto.AUTO_QUANTIZER_MAPPING",
        "quantizers.base.HfQuantizer",
        "utils.quantization_config.QuantizationConfigMixin",
        "generation.streamers.BaseStreamer",
        "tokenization_utils_base.TruncationStrategy",
    ],
)
def test_a_name_is_where_it_was(hook: str) -> None:
    module, _, name = hook.rpartition(".")
    found = getattr(importlib.import_module(f"transformers.{module}"), name, None)
    assert found is not None, f"transformers.{hook} is gone"


@pytest.mark.parametrize("hook", ["HfQuantizer.is_serializable", "HfQuantizer.is_trainable"])
def test_a_quantizer_is_asked_for_these(hook: str) -> None:
    assert hasattr(HfQuantizer, hook.split(".")[1]), f"{hook} is gone"


@pytest.mark.parametrize("hook", ["Module._modules", "Module._parameters"])
def test_the_dictionaries_of_a_module(hook: str) -> None:
    """Programs hold on to them, and notice by them that a layer or a weight was replaced."""
    layer = nn.Linear(1, 1, bias=False)
    outer = nn.Sequential(layer)
    held = {"Module._modules": (outer, "0", layer), "Module._parameters": (layer, "weight", None)}
    module, key, _ = held[hook]
    dictionary = getattr(module, hook.split(".")[1])
    replacement: Any = nn.Identity() if module is outer else nn.Parameter(torch.zeros(1, 1))
    setattr(module, key, replacement)
    assert dictionary[key] is replacement, f"{hook} is no longer what a module has"


@pytest.mark.parametrize("hook", ["torch._C.DisableTorchFunction"])
def test_a_step_is_not_asked_about_by_whoever_watches_functions(hook: str) -> None:
    seen: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        with getattr(torch._C, hook.rpartition(".")[2])():
            torch.ones(3).sum()
        assert not seen, f"{hook} does not keep a mode from being asked"
        torch.ones(3).sum()
    assert len(seen) == 2


@pytest.mark.parametrize("hook", ["logging.Logger.warning_once"])
def test_a_line_in_the_log_comes_once(hook: str) -> None:
    assert callable(getattr(environment_chatglm.logger, "warning_once", None)), f"{hook} is gone"


# Loading and placing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of floats. Do not change it."""
    path = tmp_path_factory.mktemp("hooks") / "model"
    build_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed(folder: Path) -> Any:
    """What was called while that folder was packed on the way, and the model."""
    calls: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as monkeypatch:
        count_calls(monkeypatch, QuantizedLoadingMixin, "_load_pretrained_model", calls)
        for name in ("_process_model_before_weight_loading", "_process_model_after_weight_loading"):
            count_calls(monkeypatch, ChatGLMQuantizer, name, calls)
        asked = {"quant_method": "chatglm", "bits": 8}
        model = ChatGLMForConditionalGeneration.from_pretrained(folder, quantization_config=asked)
    return SimpleNamespace(model=model, calls=calls)


@pytest.mark.parametrize(
    "hook",
    [
        "PreTrainedModel._load_pretrained_model",
        "HfQuantizer._process_model_before_weight_loading",
        "HfQuantizer._process_model_after_weight_loading",
    ],
)
def test_a_load_goes_through_our_step(hook: str, packed: Any) -> None:
    assert packed.calls[hook.split(".")[1]] == 1, f"{hook} is not called once in a load"
    layer = packed.model.transformer.layers[0].mlp.dense_h_to_4h
    expected = build_model().transformer.layers[0].mlp.dense_h_to_4h.weight
    torch.testing.assert_close(layer.unpack(torch.float32), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("hook", ["HfQuantizer.remove_quantization_config"])
def test_a_packed_model_is_no_quantized_one_of_transformers(hook: str, packed: Any) -> None:
    assert not hasattr(packed.model, "hf_quantizer"), f"{hook} leaves a quantizer behind"
    assert not hasattr(packed.model.config, "quantization_config"), hook
    assert copy.deepcopy(packed.model).half().dtype is torch.float16


@pytest.mark.parametrize("hook", ["Module.__setattr__"])
def test_packed_layers_are_loaded_frozen(hook: str, packed: Any) -> None:
    layers = [m for m in packed.model.modules() if isinstance(m, QuantizedLinear)]
    scales = [layer.weight_scale for layer in layers]
    assert layers and not any(scale.requires_grad for scale in scales), f"{hook} sees no parameters"


@pytest.mark.parametrize("hook", ["PreTrainedModel._load_pretrained_model(expected_keys)"])
def test_an_adapter_is_not_taken_for_a_checkpoint(hook: str, tmp_path: Path) -> None:
    """transformers 5 loads adapters through the same method, and marks them by this argument."""
    targets = ["query_key_value"]
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=targets, r=2)
    adapted = get_peft_model(build_model(), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(tmp_path)
    model = build_model()
    model.load_adapter(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, adapted.eval()(IDS).logits, msg=hook)


@pytest.mark.parametrize("hook", ["PreTrainedModel._keys_to_ignore_on_load_unexpected"])
def test_computed_tensors_of_official_checkpoints_are_passed_over(
    hook: str, folder: Path, tmp_path: Path
) -> None:
    build_model().config.save_pretrained(tmp_path)
    state = load_file(folder / "model.safetensors")
    state["transformer.layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    load = ChatGLMForConditionalGeneration.from_pretrained
    _, report = load(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"], f"{hook} is not read"


@pytest.mark.parametrize(
    "hook",
    [
        "PreTrainedModel._tied_weights_keys",
        "PreTrainedModel.all_tied_weights_keys",
        "PreTrainedModel.get_expanded_tied_weights_keys",
        "PreTrainedModel._tie_weights",
    ],
)
def test_a_packed_head_stays_tied_with_its_scales(hook: str, tmp_path: Path) -> None:
    """The four ways in which releases are told: 4 calls `_tie_weights`, 5 reads the other two."""
    name = hook.split(".")[1]
    if name in ("all_tied_weights_keys", "get_expanded_tied_weights_keys") and not IS_OLD:
        assert hasattr(build_model(), name), f"{hook} is gone"
    model = build_model(tie_word_embeddings=True).quantize(8, embeddings=True)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [key for key in stored if key.startswith("lm_head")], f"{hook} is not read"
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    embedding: Any = loaded.get_input_embeddings()
    for part in ("weight", "weight_scale"):
        assert getattr(loaded.lm_head, part) is getattr(embedding, part), f"{hook} is not read"


@pytest.mark.parametrize(
    "hook", ["PreTrainedModel._no_split_modules", "PreTrainedModel._skip_keys_device_placement"]
)
def test_a_model_that_is_spread_keeps_blocks_whole(hook: str, folder: Path, tmp_path: Path) -> None:
    sizes = [
        sum(p.nbytes for p in block.parameters()) for block in build_model().transformer.layers
    ]
    table = build_model().transformer.word_embeddings.weight.nbytes
    model: Any = ChatGLMForConditionalGeneration.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": table + int(2.5 * sizes[0])},
        offload_folder=str(tmp_path),
    )
    places = model.hf_device_map
    assert {"cpu", "disk"} <= set(places.values()), places
    if hook.endswith("_no_split_modules"):
        assert not [name for name in places if name.count(".") > 2], f"{hook} is not read: {places}"
    else:
        assert set(CACHE_NAMES) <= set(model._hf_hook.skip_keys), f"{hook} is not read"
    cache = ChatGLMCache()
    with torch.no_grad():
        output = model(IDS, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(output.logits, build_model()(IDS).logits)
    assert output[CACHE_NAME] is cache


@pytest.mark.parametrize("hook", ["PretrainedConfig.base_model_tp_plan"])
def test_the_plan_for_tensor_parallelism_is_read(hook: str) -> None:
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    model = build_model()
    plan = getattr(model, "tp_plan", None) or model._tp_plan
    for name, style in model.config.base_model_tp_plan.items():
        assert plan.get(f"transformer.{name}") == style, f"{hook} is not read"
        assert style in ALL_PARALLEL_STYLES, f"{hook}: {style} is gone"


@pytest.mark.parametrize("hook", ["PretrainedConfig.torch_dtype"])
def test_the_old_key_for_the_number_format_is_read(hook: str) -> None:
    config = ChatGLMConfig.from_dict({"torch_dtype": "float16"})
    assert config.dtype is torch.float16, f"{hook} is not read"


@pytest.mark.parametrize("hook", ["AutoQuantizationConfig.from_dict"])
def test_the_registries_are_read(hook: str) -> None:
    register()
    config = AutoQuantizationConfig.from_dict({"quant_method": "chatglm", "bits": 4})
    assert type(AutoHfQuantizer.from_config(config)) is ChatGLMQuantizer, hook


# The network


@pytest.mark.parametrize("hook", ["PreTrainedModel._init_weights"])
def test_a_new_model_has_xavier_s_deviation(hook: str) -> None:
    sizes = {"hidden_size": 96, "num_layers": 1, "inner_hidden_size": 384, "pre_seq_len": 64}
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**{**TINY, **sizes}))
    tables = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            is_prefix = "prefix_encoder" in name
            deviation = 1 if is_prefix else (2 / sum(parameter.shape)) ** 0.5
            assert parameter.std().item() == pytest.approx(deviation, rel=0.1), f"{hook}: {name}"
            tables += is_prefix
    assert tables


@pytest.mark.parametrize(
    "hook", ["PreTrainedModel._supports_sdpa", "PretrainedConfig._attn_implementation"]
)
def test_the_fused_kernel_is_what_a_model_gets(hook: str) -> None:
    config = ChatGLMConfig(num_layers=1)
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    assert hasattr(PreTrainedModel, "_supports_sdpa"), "PreTrainedModel._supports_sdpa is gone"
    assert model.config._attn_implementation == "sdpa", f"{hook} is not read"


@pytest.mark.parametrize("hook", ["PreTrainedModel._can_set_attn_implementation"])
def test_the_kernel_can_be_chosen_later(hook: str) -> None:
    """transformers looks for it in the text of our file."""
    model = build_model()
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager", f"{hook} does not find the look-up"
    assert ChatGLMForConditionalGeneration._can_set_attn_implementation(), hook


@pytest.mark.parametrize(
    "hook",
    [
        "GradientCheckpointingLayer.gradient_checkpointing",
        "PreTrainedModel.activation_checkpointing_enable",
    ],
)
def test_checkpointed_blocks_are_run_twice(hook: str) -> None:
    model = build_model().train()
    import_from_package("chatglm.training.models").enable_checkpointing(model)
    blocks = [m for m in model.modules() if isinstance(m, GLMBlock)]
    assert all(m.gradient_checkpointing for m in (*blocks, model.transformer)), hook
    calls: Counter[int] = Counter()
    for number, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
    labels = IDS.masked_fill(IDS != 304, -100)
    model(IDS, labels=labels, use_cache=False).loss.backward()
    assert set(calls.values()) == {2} and len(calls) == len(blocks), f"{hook} does nothing"


@pytest.mark.parametrize(
    "hook",
    [
        "PreTrainedModel.loss_function",
        "ForCausalLMLoss.shift_labels",
        "ForCausalLMLoss.num_items_in_batch",
    ],
)
def test_the_loss_is_of_the_places_that_were_asked_for(hook: str) -> None:
    model, ids = build_model(), torch.tensor([[301, 304, 5, 197, 86, 97, 5]])
    places = torch.zeros_like(ids, dtype=torch.bool)
    places[0, 2:5] = True
    with torch.no_grad():
        log_probs = model(ids, use_cache=False).logits.log_softmax(-1)[0]
        given = {"labels": ids, "logits_to_keep": places, "use_cache": False}
        mean, part = model(ids, **given).loss, model(ids, **given, num_items_in_batch=7).loss
    total = -sum(float(log_probs[place, ids[0, place + 1]]) for place in (2, 3, 4))
    assert float(mean) == pytest.approx(total / 3, rel=1e-4), hook
    assert float(part) == pytest.approx(total / 7, rel=1e-4), hook


@pytest.mark.parametrize("hook", ["PreTrainedModel.loss_function(pooled_logits)"])
def test_the_loss_of_classes(hook: str) -> None:
    model = build_model("ChatGLMForSequenceClassification", num_labels=3)
    output = model(IDS, labels=torch.tensor([2]))
    expected = nn.functional.cross_entropy(output.logits, torch.tensor([2]))
    torch.testing.assert_close(output.loss, expected, msg=hook)


# torch and llvmlite


@pytest.mark.parametrize("hook", ["torch._C._storage_Use_Count", "UntypedStorage._cdata"])
def test_columns_are_appended_in_place(hook: str) -> None:
    layer = ReservedLayer()
    one = torch.ones(1, 2, 1, 4)
    layer.update(one, one)
    before = layer.keys.data_ptr()
    layer.update(one, one)
    assert layer.keys.data_ptr() == before, f"{hook} does not tell who holds memory"


def test_without_a_count_a_cache_is_copied_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "untyped_storage", lambda self: SimpleNamespace())
        assert cache_chatglm._count_holders(torch.empty(1)) == 0
    monkeypatch.setattr(cache_chatglm, "_count_users", None)
    layer = ReservedLayer()
    for value in range(3):
        layer.update(*[torch.full((1, 2, 1, 4), float(value))] * 2)
    assert layer.keys[0, 0, :, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("hook", ["Module._apply"])
def test_casts_pass_through_packed_layers(hook: str) -> None:
    layer: Any = QuantizedLinear.from_linear(nn.Linear(64, 8), 8).to(torch.bfloat16)
    assert layer.weight_scale.dtype is torch.float32, f"{hook} is not called by .to"
    assert layer.weight.dtype is torch.int8 and layer.bias.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "hook", ["Module._forward_hooks", "Module._forward_pre_hooks", "accelerate.add_hook_to_module"]
)
def test_who_looks_into_a_block_is_noticed(hook: str) -> None:
    """A program would leave hooks of blocks uncalled, and what they show or change undone."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    watch = {
        "Module._forward_hooks": lambda m: m.register_forward_hook(lambda *args: None),
        "Module._forward_pre_hooks": lambda m: m.register_forward_pre_hook(lambda *args: None),
        "accelerate.add_hook_to_module": lambda m: add_hook_to_module(m, ModelHook()),
    }
    decoding_step = import_from_package("chatglm.cpu.decoding_step")
    block = build_model().transformer.layers[0]
    assert not decoding_step._is_watched(block)
    watch[hook](block)
    assert decoding_step._is_watched(block), f"{hook} is kept elsewhere"


@pytest.mark.parametrize("hook", ["Module._hf_hook", "AlignDevicesHook.execution_device"])
def test_where_an_offloaded_embedding_computes_is_known(hook: str) -> None:
    from accelerate import cpu_offload

    model = build_model()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert str(find_input_device(model)) == "cpu", f"{hook} says it no longer"


@pytest.mark.parametrize("hook", ["torch._check"])
def test_a_graph_is_not_made_for_an_input_of_other_columns(hook: str) -> None:
    layer: Any = QuantizedLinear(64, 32, 4, device="meta")
    packed = (layer.weight, layer.weight_scale, 4, "int8")
    product = allocate_product(torch.empty(2, 3, 64, device="meta"), *packed)
    assert product.shape == (2, 3, 32), f"{hook} is another function"
    with pytest.raises(RuntimeError):
        allocate_product(torch.empty(2, 3, 32, device="meta"), *packed)


@pytest.mark.parametrize("hook", ["aten._weight_int8pack_mm"])
def test_torch_has_a_product_with_integers(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32, bias=False), 8)
    states = torch.randn(2, 64, dtype=torch.bfloat16)
    given = (states, layer.weight, layer.weight_scale.float(), 8, "int8")
    product = TorchKernels().multiply(*given)
    assert product is not None, f"{hook} is gone"
    expected = states.float() @ layer.unpack(torch.float32).T
    torch.testing.assert_close(product.float(), expected, rtol=0.02, atol=0.02)
    monkeypatch.setattr(torch.ops, "aten", SimpleNamespace())
    assert TorchKernels().multiply(*given) is None


@pytest.mark.parametrize("hook", ["BaseTunerLayer.get_base_layer"])
def test_peft_asks_a_layer_before_it_reads_its_weight(hook: str) -> None:
    """Merged into 8-bit integers, IA3's factors round to others without an error."""
    layer = nn.Sequential(QuantizedLinear.from_linear(nn.Linear(64, 32), 8))
    config = IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
    adapted = get_peft_model(layer, config)
    with pytest.raises(ValueError, match="packed integers"):
        adapted.merge_adapter()
        pytest.fail(f"{hook} asks for no base_layer, or is called by others than WEIGHT_READERS")


@pytest.mark.parametrize("hook", ["aten._weight_int4pack_mm_for_cpu"])
def test_torch_has_a_product_with_4_bit_integers(
    hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its order is asked for with known integers; without it, or in another, nothing is moved."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch's 4-bit product is fast with AVX2 and AVX512 only")
    leave_engine_out(monkeypatch)
    layer = QuantizedLinear.from_linear(nn.Linear(64, 128), 4).bfloat16().eval()
    states = torch.randn(2, 64, dtype=torch.bfloat16)
    product = layer(states)
    stored = layer.__dict__["_parameters"]["weight"]
    assert find_int4_block_rows() and not stored.numel(), f"{hook} is gone, or has another order"
    expected = states.float() @ layer.unpack(torch.float32).T + layer.bias
    torch.testing.assert_close(product.float(), expected, rtol=0.02, atol=0.02)
    find_int4_block_rows.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch.ops, "aten", SimpleNamespace())
        torch.testing.assert_close(layer(states).float(), expected, rtol=0.02, atol=0.02)
        assert stored.numel()
    find_int4_block_rows.cache_clear()


@pytest.mark.parametrize("hook", ["Tensor._version"])
def test_what_was_written_is_counted(hook: str) -> None:
    weight = nn.Parameter(torch.zeros(4), requires_grad=False)
    assert weight.detach()._version == 0, f"{hook} counts something else"
    layer = nn.Linear(2, 2)
    layer.load_state_dict(nn.Linear(2, 2).state_dict())
    with torch.no_grad():
        weight.add_(1)
    assert weight.detach()._version and layer.weight.detach()._version, f"{hook} counts no writes"


@pytest.mark.parametrize("hook", ["Module.named_parameters(_parameters)"])
def test_who_looks_at_parameters_sees_the_official_bytes(
    hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's walks ask a module for the attribute, which is a property of packed layers."""
    leave_engine_out(monkeypatch)
    layers = nn.Sequential(QuantizedLinear.from_linear(nn.Linear(64, 128), 4)).bfloat16().eval()
    expected: Any = layers[0].weight.detach().clone()
    looks = {
        "named_parameters": lambda: dict(layers.named_parameters())["0.weight"],
        "state_dict": lambda: layers.state_dict()["0.weight"],
        "_apply": lambda: layers.half().bfloat16()[0].__dict__["_parameters"]["weight"],
    }
    for name, look in looks.items():
        layers(torch.ones(1, 64, dtype=torch.bfloat16))
        assert torch.equal(look(), expected), f"{hook} is not what {name} reads"


@pytest.mark.parametrize(
    "hook",
    [
        "llvmlite.ir.PointerType",
        "llvmlite.binding.create_mcjit_compiler",
        "llvmlite.binding.create_pass_builder",
        "llvmlite.binding.object_file",
    ],
)
def test_another_llvmlite_ends_in_the_fall_back(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the name the kernels are there; without it torch answers, and a line says why."""
    pytest.importorskip("llvmlite")
    compiler, kernel_cache = map(import_from_package, ENGINE)
    module, _, name = hook.rpartition(".")
    lines: list[str] = []
    monkeypatch.setenv(kernel_cache.CACHE_VARIABLE, "off")
    monkeypatch.setattr(compiler.logger, "warning_once", lines.append)
    layer = QuantizedLinear.from_linear(nn.Linear(64, 32), 8)
    states = torch.randn(1, 64)
    forget_kernels(monkeypatch)
    expected = layer(states)
    assert not lines, f"{hook} is gone: {lines}"
    forget_kernels(monkeypatch)
    monkeypatch.delattr(importlib.import_module(module), name)
    torch.testing.assert_close(layer(states), expected, rtol=0.05, atol=0.05)
    assert lines and all(name in line for line in lines), lines


@pytest.mark.parametrize(
    "hook",
    [
        "conversion_mapping._checkpoint_conversion_mapping_cache",
        "conversion_mapping._build_checkpoint_conversion_mapping",
    ],
)
@pytest.mark.skipif(IS_OLD, reason="4 has no patterns")
def test_the_patterns_of_other_models_are_late(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of ours compiles none, and whoever asks for another model's gets them."""
    conversions = importlib.import_module("transformers.conversion_mapping")
    cache, build = (
        "_checkpoint_conversion_mapping_cache",
        "_build_checkpoint_conversion_mapping",
    )
    assert hasattr(conversions, hook.rpartition(".")[2]), f"{hook} is gone"
    compiled = getattr(conversions, build)()
    names = {cls.__name__ for cls in ChatGLMForConditionalGeneration.__mro__} | {"chatglm"}
    assert not names & set(compiled), "there are patterns for this family now"
    old = [rule.source_patterns for rule in compiled["legacy"]]
    model = build_model()
    assert not any(
        re.search(pattern, name)
        for pattern in itertools.chain.from_iterable(old)
        for name in model.state_dict()
    ), "an old name is one of ours"
    calls: list[int] = []
    monkeypatch.setattr(conversions, build, lambda: calls.append(1) or dict(compiled))
    monkeypatch.setattr(conversions, cache, None)
    state = {"state_dict": model.state_dict()}
    ChatGLMForConditionalGeneration.from_pretrained(None, config=model.config, **state)
    assert not calls, f"{hook} is not what a load asks"
    for name in ("legacy", "glm4_moe"):
        found = conversions.get_checkpoint_conversion_mapping(name)
        assert len(found) == len(compiled[name]) and calls == [1]
    assert getattr(conversions, cache).keys() == compiled.keys()
    monkeypatch.setattr(conversions, "USER_REGISTERED_MAPPINGS", set(), raising=False)
    conversions.register_checkpoint_conversion_mapping("chatglm", [])
    assert conversions.get_checkpoint_conversion_mapping("chatglm") == []


@pytest.mark.skipif(IS_OLD, reason="4 has no patterns")
@pytest.mark.parametrize("ask", ["has", "gets", "sets"])
def test_late_patterns_are_there_for_others(ask: str) -> None:
    kept: list[Any] = []
    late = LatePatterns(lambda: {"other": [1]}, kept.append)
    asked = {
        "has": lambda: "other" in late,
        "gets": lambda: late["other"] == [1],
        "sets": lambda: late.__setitem__("mine", [2]) is None,
    }[ask]()
    mine = {"mine": [2]} if ask == "sets" else {}
    assert asked and kept == [{"other": [1], **mine}]
