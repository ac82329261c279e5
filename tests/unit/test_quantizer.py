"""Quantizing a checkpoint while it is read, and what is refused on the way."""

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b import checkpoint_chatglm, quantization, quantizer_chatglm
from chatglm_6b.checkpoint_chatglm import forget_pages, is_mapped
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
)
from chatglm_6b.quantization import quantize_weight
from chatglm_6b.quantizer_chatglm import ChatGLMQuantizationConfig
from conftest import MODEL_FILES, ROOT, TINY, build_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import load_state_dict
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
)

INPUT_IDS = torch.tensor([[7, 8, 9, 301, 304, 11, 12]])
FORMATS: tuple[dict[str, Any], ...] = (
    {"bits": 4},
    {"bits": 8, "group_size": 64},
    {"bits": 4, "group_size": 32, "embeddings": True},
)
MLP = "transformer.layers.1.mlp.dense_h_to_4h"
SHARDS = 2
State = dict[str, Tensor]

every_format = pytest.mark.parametrize("weight_format", FORMATS, ids=str)
both_bits = pytest.mark.parametrize("bits", [4, 8])


def write_checkpoint(folder: Path, state: State, kind: str = "bin", **fields: Any) -> Path:
    """Write a folder of remote code, with the tensors in shards of one kind."""
    folder.mkdir(exist_ok=True)
    for name in MODEL_FILES:
        shutil.copy(ROOT / name, folder)
    config = json.loads((ROOT / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **TINY, **fields}))
    suffix = "safetensors" if kind == "safetensors" else "bin"
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for number in range(SHARDS):
        shard = f"{stem}-{number + 1:05}-of-{SHARDS:05}.{suffix}"
        part = {name: state[name].contiguous() for name in sorted(state)[number::SHARDS]}
        if kind == "safetensors":
            save_file({k: v.clone() for k, v in part.items()}, folder / shard, {"format": "pt"})
        else:
            torch.save(part, folder / shard, _use_new_zipfile_serialization=kind == "bin")
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def make_state(dtype: torch.dtype = torch.float16, **quantized: Any) -> State:
    """Return what a checkpoint stores, the head beside the embedding as in the official ones."""
    model = build_model().to(dtype)
    if quantized:
        model.quantize(**quantized)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A half checkpoint that no test may change."""
    return write_checkpoint(tmp_path_factory.mktemp("half") / "tiny_half", make_state())


def ask(**weight_format: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "chatglm", **weight_format}}


def as_fields(bits: int, group_size: int | None = None, embeddings: bool = False) -> dict[str, Any]:
    return {
        "quantization_bit": bits,
        "quantization_group_size": group_size,
        "quantization_embeddings": embeddings,
    }


def load(folder: Path, **options: Any) -> Any:
    """Load by the class of this tree, which tests can reach into; nothing may be left over."""
    model, report = ChatGLMForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, **{"dtype": torch.float16, **options}
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def load_auto(folder: Path, **options: Any) -> Any:
    options = {"dtype": torch.float16, **options}
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


def assert_same(model: Any, expected: Any) -> None:
    """Bit by bit, dtypes and ties included, and as a model that works."""
    states = (model.state_dict(), expected.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert states[0][name].dtype == tensor.dtype, name
        assert torch.equal(states[0][name], tensor), name
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert as_fields_of(model) == as_fields_of(expected)
    with torch.no_grad():
        assert torch.equal(model(INPUT_IDS).logits, expected(INPUT_IDS).logits)


def as_fields_of(model: Any) -> dict[str, Any]:
    return {name: getattr(model.config, name) for name in as_fields(0)}


# What comes out


@every_format
@pytest.mark.parametrize("kind", ["bin", "safetensors", "legacy"])
def test_a_load_equals_quantizing_a_half_model(
    weight_format: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "tiny", make_state(), kind)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        expected = load(folder).quantize(**weight_format).to(dtype)
        model = load(folder, dtype=dtype, **ask(**weight_format))
        assert_same(model, expected)
        assert not model.training
        packed = [layer for layer in model.modules() if hasattr(layer, "weight_scale")]
        assert len(packed) == 12 + 2 * weight_format.get("embeddings", False)
        assert not any(p.requires_grad for layer in packed for p in layer.parameters())
        assert_same(model.float().half(), expected.half())  # which a quantizer's model refuses


@every_format
def test_the_configuration_s_fields_do_the_same(
    weight_format: dict[str, Any], half_folder: Path
) -> None:
    expected = load(half_folder).quantize(**weight_format)
    fields = as_fields(**weight_format)
    assert_same(load(half_folder, **fields), expected)
    config = ChatGLMConfig.from_pretrained(half_folder, **fields)
    assert_same(load(half_folder, config=config), expected)


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, "auto", "cpu"], ids=str)
def test_the_auto_classes_and_device_maps(device_map: Any, half_folder: Path) -> None:
    weight_format = FORMATS[2]
    expected = load(half_folder).quantize(**weight_format)
    options = {} if device_map is None else {"device_map": device_map}
    assert_same(load_auto(half_folder, **ask(**weight_format), **options), expected)
    fields = as_fields(**weight_format)
    assert_same(load_auto(half_folder, **fields, **options), expected)
    config = AutoConfig.from_pretrained(half_folder, trust_remote_code=True, **fields)
    assert_same(load_auto(half_folder, config=config, **options), expected)


def test_the_meta_device_gets_the_shapes_alone(half_folder: Path) -> None:
    expected = load(half_folder).quantize(4).state_dict()
    model = load(half_folder, device_map={"": "meta"}, **ask(bits=4))
    assert {name: (t.device.type, t.dtype, t.shape) for name, t in model.state_dict().items()} == {
        name: ("meta", t.dtype, t.shape) for name, t in expected.items()
    }


@both_bits
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_as_they_are_stored(
    bits: int, stored: torch.dtype, tmp_path: Path
) -> None:
    state = make_state(stored)
    folder = write_checkpoint(tmp_path / "tiny", state)
    integers, scale = quantize_weight(state[f"{MLP}.weight"], bits)
    for dtype in (torch.float16, torch.float32):
        layer = load(folder, dtype=dtype, **ask(bits=bits)).get_submodule(MLP)
        assert torch.equal(layer.weight, integers)
        assert torch.equal(layer.weight_scale, scale.to(dtype))
        assert layer.bias.dtype == dtype


def test_other_classes_load_the_same_checkpoint(half_folder: Path, tmp_path: Path) -> None:
    expected = load(half_folder).quantize(8).transformer.state_dict()
    options = {"dtype": torch.float16, "output_loading_info": True, **ask(bits=8)}
    base, _ = ChatGLMModel.from_pretrained(half_folder, **options)
    scorer, report = ChatGLMForSequenceClassification.from_pretrained(half_folder, **options)
    assert set(report["missing_keys"]) == {"score.weight"}
    base.save_pretrained(tmp_path / "base")
    headed = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "base")
    for stack in (base, scorer.transformer, headed.transformer):
        state = stack.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_tensors_of_the_caller_s_are_left_alone(half_folder: Path) -> None:
    state, before = make_state(), make_state()
    config = ChatGLMConfig.from_pretrained(half_folder)
    model = load(None, config=config, state_dict=state, **ask(bits=4))
    assert_same(model, load(half_folder).quantize(4))
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_a_head_of_its_own_is_packed_by_itself(tmp_path: Path) -> None:
    model = build_model(tie_word_embeddings=False).half()
    folder = write_checkpoint(tmp_path / "tiny", model.state_dict(), tie_word_embeddings=False)
    loaded = load(folder, **ask(**FORMATS[2]))
    expected = model.quantize(**FORMATS[2]).state_dict()
    state = loaded.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(state["lm_head.weight"], state["transformer.word_embeddings.weight"])


# peft reads and calls what transformers 5.23 deprecates.
@pytest.mark.filterwarnings(
    "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is:FutureWarning"
)
def test_an_adapter_loads_into_a_quantized_model(half_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(
        load(half_folder, **ask(bits=4)), LoraConfig(target_modules=["query_key_value"])
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    model = load(half_folder, **ask(bits=4))
    plain = model(INPUT_IDS).logits
    model.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(model(INPUT_IDS).logits, tuned.eval()(INPUT_IDS).logits)
    assert not torch.equal(model(INPUT_IDS).logits, plain)


# How it is read


def test_one_block_of_one_matrix_is_worked_on_at_a_time(
    half_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(half_folder).quantize(4)
    at_work, most, blocks = threading.Semaphore(1), [], []

    def quantize_and_watch(block: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        most.append(at_work.acquire(blocking=False))
        blocks.append(block.numel())
        try:
            return quantize_weight(block, *args)
        finally:
            at_work.release()

    monkeypatch.setattr(quantization, "quantize_weight", quantize_and_watch)
    monkeypatch.setattr(checkpoint_chatglm, "WEIGHTS_AT_ONCE", 1000)
    assert_same(load(half_folder, **ask(bits=4)), expected)
    assert all(most)
    assert max(blocks) <= 1000
    matrices = [t for name, t in make_state().items() if ".layers." in name and t.dim() == 2]
    assert sum(blocks) == sum(matrix.numel() for matrix in matrices)


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="pages are told by /proc")


def count_resident(tensor: Tensor) -> int:
    """Return the resident bytes of the mapping that a tensor lies in."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        area = line.split()[0]
        if "-" in area and not area.endswith(":"):
            start, end = (int(number, 16) for number in area.split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside and area == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("no such mapping")


@linux_only
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_pages_are_given_back_and_read_again(kind: str, tmp_path: Path) -> None:
    values = torch.arange(2**20, dtype=torch.int32)
    file = tmp_path / f"weights.{kind}"
    if kind == "bin":
        torch.save({"values": values}, file)
    else:
        save_file({"values": values}, file, {"format": "pt"})
    stored = load_state_dict(str(file), map_location="cpu")["values"]
    assert is_mapped(stored) and not is_mapped(values)
    assert torch.equal(stored, values)
    assert count_resident(stored) >= values.nbytes
    forget_pages(stored)
    assert count_resident(stored) < 2**16
    assert torch.equal(stored, values)


def test_a_row_is_named_as_the_matrix_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_chatglm, "WEIGHTS_AT_ONCE", 640)  # ten rows
    state = make_state()
    state[f"{MLP}.weight"][123, 6] = float("inf")
    folder = write_checkpoint(tmp_path / "tiny", state)
    with pytest.raises(ValueError, match=rf"{MLP}\.weight cannot be quantized: row 123 reaches"):
        load(folder, **ask(bits=4))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", make_state())
    first, second = sorted(folder.glob("*.bin"))
    torch.save(torch.load(second) | torch.load(first), second)
    with pytest.raises(ValueError, match=rf"in {first.name} is also in .*{second.name}: remove"):
        load(folder)


@linux_only
def test_every_mapped_matrix_is_given_back(
    half_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[int] = []

    def forget_and_note(block: Tensor) -> None:
        assert is_mapped(block)
        given_back.append(block.nbytes)
        forget_pages(block)

    monkeypatch.setattr(checkpoint_chatglm, "forget_pages", forget_and_note)
    model = load(half_folder, **ask(bits=4))
    stored = sum(tensor.nbytes for tensor in make_state().values())
    assert sum(given_back) >= stored
    assert not any(is_mapped(tensor) for tensor in model.state_dict().values())


# Saving and loading again


@pytest.mark.parametrize(
    "weight_format", [{"bits": 4}, {"bits": 8}, {"bits": 4, "embeddings": True}], ids=str
)
def test_official_quantized_checkpoints_load_as_they_are(
    weight_format: dict[str, Any], tmp_path: Path
) -> None:
    """Their shards hold both names of what is tied, with embeddings the head's scales too."""
    state = make_state(**weight_format)
    has_embeddings = weight_format.get("embeddings", False)
    assert ("lm_head.weight_scale" in state) == has_embeddings
    fields = as_fields(**weight_format)
    del fields["quantization_group_size"]  # the official configurations do not know it
    folder = write_checkpoint(tmp_path / "official", state, **fields)
    expected = build_model().half().quantize(**weight_format)
    assert_same(load(folder), expected)
    assert_same(load_auto(folder), expected)
    if has_embeddings:
        model = load(folder)
        assert model.lm_head.weight_scale is model.transformer.word_embeddings.weight_scale


@every_format
def test_what_is_saved_has_the_official_fields_and_loads(
    weight_format: dict[str, Any], half_folder: Path, tmp_path: Path
) -> None:
    model = load_auto(half_folder, **ask(**weight_format))
    model.save_pretrained(tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    for name, value in as_fields(**weight_format).items():
        assert fields.get(name) == value
    assert "quantization_config" not in fields
    for options in ({}, ask(**weight_format), as_fields(**weight_format)):
        assert_same(load(tmp_path / "saved", **options), model)
        assert_same(load(tmp_path / "saved", device_map={"": "cpu"}, **options), model)
    assert_same(load_auto(tmp_path / "saved"), model)
    wider = load(tmp_path / "saved", dtype=torch.bfloat16)
    narrower = load(tmp_path / "saved", dtype=torch.bfloat16, **ask(**weight_format))
    assert_same(narrower, wider)  # bfloat16 scales would be others


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bits": 8}, "quantized to 4 bits in groups of 32 and cannot be quantized to 8 bits"),
        ({"bits": 4}, "quantized to 4 bits in groups of 32 and cannot be quantized to 4 bits:"),
        ({"bits": 4, "group_size": 64}, "and cannot be quantized to 4 bits in groups of 64"),
    ],
)
def test_another_format_for_a_quantized_folder_is_refused(
    asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    quantized = {"bits": 4, "group_size": 32}
    folder = write_checkpoint(tmp_path / "tiny", make_state(**quantized), **as_fields(**quantized))
    with pytest.raises(ValueError, match=message):
        load(folder, **ask(**asked))


# transformers says that it prefers the configuration's to the one passed beside it.
@pytest.mark.filterwarnings("ignore:You passed .quantization_config.*:UserWarning")
def test_a_stored_quantization_config_is_understood(tmp_path: Path) -> None:
    stored = ask(bits=8)
    quantized = write_checkpoint(tmp_path / "tiny", make_state(bits=8), **stored, **as_fields(8))
    expected = load(quantized)
    floating = write_checkpoint(tmp_path / "tiny_float", make_state(), **stored)
    for folder in (quantized, floating):
        assert_same(load(folder), expected)
        assert_same(load(folder, **ask(bits=8)), expected)
        with pytest.raises(ValueError, match="quantized to 8 bits, and quantization_config asks"):
            load(folder, **ask(bits=4))


def test_every_folder_s_copy_of_the_code_serves_every_folder(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / f"copy_{i}", make_state()) for i in range(2)]
    models = [load_auto(folder, **ask(bits=4)) for folder in (*folders, folders[0])]
    assert len({type(model).__module__ for model in models}) == 2
    assert_same(models[1], models[0])
    assert_same(models[2], models[0])
    own = quantizer_chatglm.ChatGLMQuantizationConfig
    foreign = AUTO_QUANTIZATION_CONFIG_MAPPING["chatglm"]
    assert foreign is not own  # that of the folder loaded last
    assert type(AutoQuantizationConfig.from_dict(ask(bits=4)["quantization_config"])) is foreign
    assert_same(load(folders[0], quantization_config=foreign(bits=4)), models[0])
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["chatglm"] is own
    assert AUTO_QUANTIZER_MAPPING["chatglm"] is quantizer_chatglm.ChatGLMQuantizer


# What is refused


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({}, "bits must be 4 or 8, got None"),
        ({"bits": 4, "group_size": 16}, r"group_size must be one of \(32, 64, 128\).*got 16"),
        ({"bits": 4, "groups": 32}, "has no groups: it takes bits, group_size and embeddings"),
        ({"bits": 4, "group_size": 128}, r"transformer\.layers\.0\.\S+ has 64 columns.* 128 do"),
    ],
)
def test_formats_that_there_are_not(asked: dict[str, Any], message: str, half_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(half_folder, **ask(**asked))
    if asked.get("group_size") != 128:
        with pytest.raises(ValueError, match=message):
            ChatGLMQuantizationConfig(**asked)


def drop_scale(state: State) -> None:
    del state[f"{MLP}.weight_scale"]


def drop_matrix(state: State) -> None:
    del state[f"{MLP}.weight"]


def spoil_scale(value: float) -> Any:
    def spoil(state: State) -> None:
        state[f"{MLP}.weight_scale"][3] = value

    return spoil


def widen(state: State) -> None:
    state[f"{MLP}.weight"] = state[f"{MLP}.weight"].float()


def spoil_matrix(state: State) -> None:
    state[f"{MLP}.weight"][5, 6] = float("inf")


def cut_matrix(state: State) -> None:
    state[f"{MLP}.weight"] = state[f"{MLP}.weight"][:, :32].clone()


def cut_norm(state: State) -> None:
    state["transformer.final_layernorm.bias"] = torch.zeros(8, dtype=torch.float16)


def drop_norm(state: State) -> None:
    del state["transformer.final_layernorm.weight"]


def add_block(state: State) -> None:
    state["transformer.layers.3.mlp.dense_4h_to_h.bias"] = torch.zeros(64)


def add_to_block(state: State) -> None:
    state[f"{MLP}.lora"] = torch.zeros(1)


def keep(state: State) -> None:
    """Change nothing: the configuration is what is wrong."""


W = MLP.replace(".", r"\.") + r"\.weight"
EIGHT, FOUR, GROUPED = as_fields(8), as_fields(4), as_fields(4, 32)
FIRST = r"transformer\.layers\.0\.attention\.query_key_value\.weight"


@pytest.mark.parametrize(
    ("quantized", "fields", "change", "message"),
    [
        (
            {"bits": 8},
            EIGHT,
            drop_scale,
            rf"{W} in .* is stored as torch\.int8, but .*no {W}_scale",
        ),
        ({"bits": 8}, EIGHT, drop_matrix, rf"the weights lack {W}; use .* all of their shards"),
        ({"bits": 8}, EIGHT, spoil_scale(float("nan")), rf"{W}_scale in \S+ holds nan, and every"),
        ({"bits": 4}, FOUR, spoil_scale(float("-inf")), rf"{W}_scale in \S+ holds -inf, and every"),
        ({"bits": 4}, EIGHT, keep, rf"{FIRST} .*\(192, 32\), which is 4 bits.*set .* to 4"),
        ({"bits": 8}, FOUR, keep, rf"{FIRST} .*\(192, 64\), which is 8 bits.*set .* to 8"),
        ({"bits": 4}, GROUPED, keep, rf"{FIRST}_scale .*\(192,\).* 32 makes it \(192, 2\).*None"),
        ({"bits": 4, "group_size": 64}, GROUPED, keep, rf"{FIRST}_scale .*\(192, 1\).*it to 64"),
        ({"bits": 4, "group_size": 32}, FOUR, keep, rf"{FIRST}_scale .*\(192, 2\).*it to 32"),
        ({"bits": 8}, as_fields(0), keep, r"int8, and the configuration .*set .*bit to 8"),
        ({"bits": 4}, as_fields(0), keep, r"int8, and the configuration .*set .*bit to 4"),
        ({"bits": 8, "embeddings": True}, EIGHT, keep, r"word_embeddings.*embeddings if|lm_head"),
        ({"bits": 8}, as_fields(8, None, True), keep, r"float16 and .*int8|int8 and .*float16"),
        ({"bits": 8}, EIGHT, widen, rf"int8 and {W} in \S+ as torch\.float32: take"),
        ({}, EIGHT, widen, rf"float16 and {W} in \S+ as torch\.float32: take all shards"),
        ({}, EIGHT, spoil_matrix, rf"{W} cannot be quantized: row 5 reaches inf"),
        ({}, EIGHT, cut_matrix, rf"{W} .*sizes \(256, 32\).*\(256, 64\).*config\.json"),
        ({"bits": 8}, EIGHT, cut_matrix, rf"{W} .*sizes \(256, 32\), which is 4 bits"),
        ({}, EIGHT, cut_norm, r"final_layernorm\.bias .*\(8,\).*\(64,\).*ignore_mismatched"),
        ({}, as_fields(0), cut_norm, r"final_layernorm\.bias .*\(8,\).*\(64,\).*ignore_mismatch"),
        ({}, EIGHT, drop_norm, r"weights lack transformer\.final_layernorm\.weight; use the"),
        ({}, {}, drop_matrix, rf"the weights lack {W}; use .* and all of their shards"),
        ({}, {}, add_block, "the configuration has num_layers 3, and the weights 4; use the"),
        ({}, {}, add_to_block, rf"the model has no place for {MLP}\.lora; use the config"),
        (
            {},
            {"vocab_size": 321, "num_layers": 2},
            keep,
            "has vocab_size 321, num_layers 2, and the",
        ),
        (
            {},
            {"inner_hidden_size": 128},
            keep,
            "has inner_hidden_size 128, and the weights 256; use",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_checkpoints_that_are_not_the_configuration_s(
    quantized: dict[str, Any],
    fields: dict[str, Any],
    change: Any,
    message: str,
    kind: str,
    tmp_path: Path,
) -> None:
    state = make_state(**quantized)
    change(state)
    folder = write_checkpoint(tmp_path / "tiny", state, kind, **fields)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("listed", [True, False])
def test_an_index_of_other_shards_is_refused(listed: bool, tmp_path: Path) -> None:
    state = make_state(bits=8)
    if listed:  # float shards beside the index of quantized ones
        folder = write_checkpoint(tmp_path / "tiny", state, **EIGHT)
        index = (folder / "pytorch_model.bin.index.json").read_text()
        write_checkpoint(folder, make_state(), **EIGHT)
        (folder / "pytorch_model.bin.index.json").write_text(index)
        message = r"index lists transformer\.\S+\.weight_scale, and its shards' data does not hold"
    else:
        folder = write_checkpoint(tmp_path / "tiny", state, **EIGHT)
        file = folder / "pytorch_model.bin.index.json"
        index = json.loads(file.read_text())
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "scale" not in k}
        file.write_text(json.dumps(index))
        message = r"index does not list transformer\.\S+\.weight_scale, and its .* holds it"
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_sizes_may_differ_on_request(tmp_path: Path) -> None:
    state = make_state()
    cut_norm(state)
    folder = write_checkpoint(tmp_path / "tiny", state)
    for options in ({}, ask(bits=8)):
        model, report = ChatGLMForConditionalGeneration.from_pretrained(
            folder, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        names = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
        assert names == ["transformer.final_layernorm.bias"]
        assert model.transformer.final_layernorm.bias.tolist() == [0.0] * 64


def test_layers_on_disk_must_be_quantized_before(half_folder: Path, tmp_path: Path) -> None:
    device_map = {"transformer": "cpu", "lm_head": "cpu", "transformer.layers.0": "disk"}
    options = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ValueError, match=r'puts layers on "disk".*save a quantized checkpoint'):
        load(half_folder, **options, **ask(bits=4))
