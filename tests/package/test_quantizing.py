"""`chatglm quantize`: what it writes, what it merges, what it refuses, and how it survives a stop.

Every result is compared with what a user would get in memory: the model of the source folder, in
half, merged by peft where there is an adapter, and quantized.
"""

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build_model
from model_folders import (
    THIN,
    Weights,
    change_json,
    copy_in_half,
    hashes,
    make_adapter,
    make_official,
    old_name,
    read_json,
    replace_weights,
    stored,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from chatglm import cli
from chatglm.converting import conversion, planning, staging
from chatglm.converting.conversion import quantize_checkpoint
from chatglm.converting.planning import Form, PackedFormat

INT4 = PackedFormat(4)
NORM = "transformer.final_layernorm.weight"
TABLE = "transformer.word_embeddings.weight"
DENSE = "transformer.layers.0.attention.dense.weight"
BIAS = "transformer.layers.0.attention.dense.bias"


def load(folder: Path) -> Any:
    """The model of a folder, with all its weights in their places, in half."""
    model, report = AutoModel.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float16, output_loading_info=True
    )
    assert not any(report.values()), report
    return model


def assert_same(folder: Path, expected: Any) -> None:
    """Each integer and each scale of a folder is that of a model in memory."""
    found, wanted = load(folder).state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def source(tiny_repo: Path, tmp_path: Path) -> Path:
    """A model folder of our own to change: half weights in one safetensors file."""
    return copy_in_half(tiny_repo, tmp_path / "source")


# What is written


@pytest.mark.parametrize(
    ("bits", "group_size", "embeddings"),
    [(4, None, False), (8, None, True), (4, 32, True), (8, 32, False)],
)
def test_a_folder_equals_the_model_quantized_in_memory(
    tiny_repo: Path, tmp_path: Path, bits: int, group_size: Any, embeddings: bool
) -> None:
    packed_format = PackedFormat(bits, group_size, embeddings)
    size = quantize_checkpoint(tiny_repo, tmp_path / "new", packed_format)
    model = AutoModel.from_pretrained(tiny_repo, trust_remote_code=True).half()
    expected = model.quantize(bits, group_size=group_size, embeddings=embeddings)
    assert_same(tmp_path / "new", expected)
    tensors = stored(tmp_path / "new")
    assert size == sum(tensor.nbytes for tensor in tensors.values())
    assert tensors.keys() == expected.state_dict().keys() - {
        "lm_head.weight",  # the embedding's own; a safetensors file cannot hold it twice
        "lm_head.weight_scale",
    }
    assert not (tmp_path / "new.part").exists()


def test_the_folder_is_complete(tiny_repo: Path, tmp_path: Path) -> None:
    new = tmp_path / "deep" / "new"
    quantize_checkpoint(tiny_repo, new, INT4)
    files = {path.name: path for path in tiny_repo.iterdir()}
    added = {"SHA256SUMS", "LICENSE", "README.md", "origin.json"}
    assert {path.name for path in new.iterdir()} == files.keys() | added
    for name in files.keys() - {"config.json", "model.safetensors"}:
        assert (new / name).read_bytes() == files[name].read_bytes(), name
    assert read_json(new / "config.json") == read_json(tiny_repo / "config.json") | {
        "torch_dtype": "float16",
        "quantization_bit": 4,
        "quantization_group_size": None,
        "quantization_embeddings": False,
    }
    with safe_open(new / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    tokenizers = [
        AutoTokenizer.from_pretrained(f, trust_remote_code=True) for f in (tiny_repo, new)
    ]
    ids = [tokenizer("你好")["input_ids"] for tokenizer in tokenizers]
    assert ids[0] == ids[1]
    sums = re.findall(r"^([0-9a-f]{64})  (.+)$", (new / "SHA256SUMS").read_text(), re.MULTILINE)
    found = hashes(new)
    # A card is completed by hand, and a record of places stays on this machine.
    del found["SHA256SUMS"], found["README.md"], found["origin.json"]
    assert {name: digest for digest, name in sums} == found
    modes = {path.stat().st_mode & 0o777 for path in new.iterdir()}
    assert len(modes) == 1  # what reads one reads all


@pytest.mark.parametrize(
    ("vocab_size", "preset"), [(130528, "chatglm-6b"), (150528, "chatglm-6b-v0")]
)
def test_an_official_folder_gets_the_settings_of_its_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, preset: str
) -> None:
    monkeypatch.setattr(planning, "MAX_SHARD_BYTES", 2000)
    weights = make_official(tmp_path / "old", vocab_size)
    quantize_checkpoint(tmp_path / "old", tmp_path / "new", INT4)
    new, settings = tmp_path / "new", ROOT / "chatglm" / "presets" / preset
    expected = read_json(settings / "config.json") | THIN
    assert read_json(new / "config.json") == expected | INT4.fields()
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (new / name).read_bytes() == (settings / name).read_bytes()
    for name in ("modeling_chatglm.py", "quantization.py", "chat_template.jinja", "LICENSE"):
        assert (new / name).read_bytes() == (ROOT / name).read_bytes()
    assert (new / "MODEL_LICENSE").read_text() == "the model's\n"
    tensors = stored(new)
    assert tensors[NORM].dtype == torch.float32 and tensors[BIAS].dtype == torch.float16
    kept = [name for name, tensor in tensors.items() if tensor.dtype != torch.int8]
    kept = [name for name in kept if not name.endswith("_scale")]
    assert all(torch.equal(tensors[name], weights[name]) for name in kept)
    assert_index(new, tensors, 2000)
    model = build_model(**{**THIN, "vocab_size": vocab_size})
    model.load_state_dict({n: t.float() for n, t in weights.items() if "inv_freq" not in n})
    assert_same(new, model.half().quantize(4))


def assert_index(folder: Path, tensors: Weights, limit: int) -> None:
    """The index is true, and no shard but that of a large tensor is above the limit."""
    index = read_json(folder / "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert [shard.name for shard in shards] == names
    found = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == found
    for shard in shards:
        sizes = [tensor.nbytes for tensor in load_file(shard).values()]
        assert sum(sizes) <= limit or len(sizes) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_fine_tunes_in_one_file_and_other_floats(
    tiny_repo: Path, source: Path, tmp_path: Path, file: str, dtype: torch.dtype
) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in stored(tiny_repo).items()}
    (source / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(weights, source / file)
    else:
        save_file(weights, source / file, metadata={"format": "pt"})
    quantize_checkpoint(source, tmp_path / "new", INT4)
    dtypes = {str(t.dtype) for n, t in stored(tmp_path / "new").items() if t.dim() == 2}
    assert dtypes == {"torch.int8", "torch.float16"}
    model = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=dtype)
    assert_same(tmp_path / "new", model.half().quantize(4))


def test_our_saved_models_keep_their_own_settings(source: Path, tmp_path: Path) -> None:
    """Also after transformers has saved them again."""
    model = AutoModel.from_pretrained(source, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    tokenizer.save_pretrained(tmp_path / "again")
    settings = tmp_path / "again" / "generation_config.json"
    change_json(settings, top_p=0.25)
    change_json(tmp_path / "again" / "config.json", vocab_size_note="mine")
    quantize_checkpoint(tmp_path / "again", tmp_path / "new", PackedFormat(8))
    assert (tmp_path / "new" / settings.name).read_bytes() == settings.read_bytes()
    assert read_json(tmp_path / "new" / "config.json")["vocab_size_note"] == "mine"
    assert_same(tmp_path / "new", model.half().quantize(8))
    again = AutoTokenizer.from_pretrained(tmp_path / "new", trust_remote_code=True)
    assert again("你好").input_ids == tokenizer("你好").input_ids


def test_float_weights_whose_configuration_names_another_format(
    source: Path, tmp_path: Path
) -> None:
    """It says how to load them; the tensors say that they are not quantized yet."""
    change_json(source / "config.json", quantization_bit=8, quantization_embeddings=True)
    quantize_checkpoint(source, tmp_path / "new", INT4)
    fields = read_json(tmp_path / "new" / "config.json")
    assert {name: fields[name] for name in INT4.fields()} == INT4.fields()
    assert load(tmp_path / "new").config.quantization_bit == 4


def test_an_untied_head_is_kept_and_packed_apart(source: Path, tmp_path: Path) -> None:
    change_json(source / "config.json", tie_word_embeddings=False)
    replace_weights(source, lambda w: w.update({"lm_head.weight": w[TABLE].flip(0).clone()}))
    quantize_checkpoint(source, tmp_path / "new", PackedFormat(8, embeddings=True))
    tensors = stored(tmp_path / "new")
    assert torch.equal(tensors["lm_head.weight"], tensors[TABLE].flip(0))
    assert torch.equal(load(tmp_path / "new").lm_head.weight, tensors["lm_head.weight"])


def test_a_tied_embedding_stored_as_the_head_is_found(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "new", INT4)
    replace_weights(source, lambda w: w.update({"lm_head.weight": w.pop(TABLE)}))
    quantize_checkpoint(source, tmp_path / "same", INT4)
    names = "SHA256SUMS", "model.safetensors"
    assert all(hashes(tmp_path / "new")[n] == hashes(tmp_path / "same")[n] for n in names)


def test_a_prefix_stays_as_it_is(tmp_path: Path) -> None:
    weights = make_official(tmp_path / "old", 8192, pre_seq_len=3)
    quantize_checkpoint(tmp_path / "old", tmp_path / "new", INT4)
    name = "transformer.prefix_encoder.embedding.weight"
    assert torch.equal(load(tmp_path / "new").state_dict()[name], weights[name])


def test_no_matrix_stays_in_the_plan(source: Path, tmp_path: Path) -> None:
    """Or the whole quantized model would gather in memory."""
    plan = planning.make_plan(planning.read_source(source), Form(INT4))
    (piece,) = [p for pieces in plan.shards.values() for p in pieces if p.name == DENSE]
    tensors = conversion.convert(piece, ())
    assert tensors[DENSE].dtype == torch.int8
    assert piece.layer is not None and piece.layer.weight.is_meta


@pytest.mark.skipif(sys.platform != "linux", reason="pages are told by /proc")
def test_what_has_been_read_of_a_file_does_not_count_as_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix is given back, in blocks, and the whole file is read."""
    reader = importlib.import_module("chatglm.model.checkpoint_chatglm")
    given_back: list[int] = []

    def forget_and_note(block: torch.Tensor) -> None:
        assert reader.is_mapped(block)
        given_back.append(block.nbytes)
        forget_pages(block)

    forget_pages = reader.forget_pages
    monkeypatch.setattr(reader, "forget_pages", forget_and_note)
    monkeypatch.setattr(reader, "WEIGHTS_AT_ONCE", 1000)
    quantize_checkpoint(source, tmp_path / "new", INT4)
    assert sum(given_back) == sum(tensor.nbytes for tensor in stored(source).values())
    assert max(given_back) <= 2 * 1000
    assert_same(tmp_path / "new", load(source).quantize(4))


# LoRA


@old_name
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "target_modules": ["query_key_value", "attention.dense", "dense_h_to_4h"],
            "use_rslora": True,
            "fan_in_fan_out": True,
            "modules_to_save": ["final_layernorm", "dense_4h_to_h"],
        },
    ],
)
def test_an_adapter_is_merged_as_peft_does(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    from peft import PeftModel

    make_adapter(source, tmp_path / "lora", **options)
    base = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=torch.float16)
    merged = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    quantize_checkpoint(source, tmp_path / "new", INT4, str(tmp_path / "lora"))
    assert_same(tmp_path / "new", merged.quantize(4))
    quantize_checkpoint(source, tmp_path / "plain", INT4)
    merged_names = {n for n, t in stored(tmp_path / "new").items() if is_other(t, n, tmp_path)}
    assert any("query_key_value.weight" in name for name in merged_names)


def is_other(tensor: torch.Tensor, name: str, base: Path) -> bool:
    return not torch.equal(tensor, load_file(base / "plain" / "model.safetensors")[name])


@old_name
def test_half_factors_in_a_torch_file_give_the_same(source: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    make_adapter(source, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    torch.save({n: t.half() for n, t in load_file(file).items()}, file.with_suffix(".bin"))
    file.unlink()
    base = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=torch.float16)
    merged = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    quantize_checkpoint(source, tmp_path / "new", INT4, str(tmp_path / "lora"))
    assert_same(tmp_path / "new", merged.quantize(4))


LAYER = "base_model.model.transformer.layers.0.attention.query_key_value"
FACTORS = {f"{LAYER}.lora_A.weight": (3, 32), f"{LAYER}.lora_B.weight": (96, 3)}
CHANGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"use_dora": True}, {}, "has no magnitude for"),
    ({"bias": "some"}, {}, "bias='some'"),
    ({"peft_type": "LOHA"}, {}, "peft_type='LOHA'"),
    ({"peft_type": None}, {}, "peft_type=None"),
    ({"rank_pattern": {"query_key_value": 4}}, {}, "has rank 3 for .* says r=4"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa'"),
    ({"some_new_kind": 1}, {}, "some_new_kind=1"),
    ({"r": 0}, {}, "has no r:"),
    ({"r": 4}, {}, "has rank 3 for transformer.layers.0.*, and adapter_config.json says r=4"),
    ({}, {f"{LAYER}.lora_B.weight": None}, "lacks transformer.*query_key_value.lora_B.weight"),
    ({}, {f"{LAYER}.lora_B.weight": (95, 3)}, r"factors \(95, 3\) and \(3, 32\).*another model"),
    ({}, {f"{LAYER}.lora_B.weight": (96, 2)}, r"factors \(96, 2\) and \(3, 32\)"),
    ({}, {f"{LAYER}.lora_magnitude_vector": (96,)}, "has a magnitude for .* says use_dora=False"),
    ({}, {"base_model.model.lm_head.weight": (8192, 32)}, "lm_head.weight, which is neither"),
    ({}, {f"base_model.model.{NORM}": (31,)}, r"final_layernorm.weight as \(31,\)"),
]


def write_adapter(folder: Path, fields: dict[str, Any], shapes: dict[str, Any]) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {n: torch.ones(shape) for n, shape in (FACTORS | shapes).items() if shape}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(("fields", "shapes", "message"), CHANGES)
def test_what_cannot_be_merged_is_refused_by_name(
    tiny_repo: Path, tmp_path: Path, fields: Any, shapes: Any, message: str
) -> None:
    write_adapter(tmp_path / "lora", fields, shapes)
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(tiny_repo, tmp_path / "new", INT4, str(tmp_path / "lora"))
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_an_adapter_for_a_tied_head_is_refused(tiny_repo: Path, tmp_path: Path) -> None:
    head = "base_model.model.lm_head"
    shapes = {f"{head}.lora_A.weight": (3, 32), f"{head}.lora_B.weight": (8192, 3)}
    write_adapter(tmp_path / "lora", {}, shapes)
    with pytest.raises(ValueError, match=r"is for lm_head.weight, which is no linear layer"):
        quantize_checkpoint(tiny_repo, tmp_path / "new", INT4, str(tmp_path / "lora"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("adapter_config.json", "has neither adapter_config.json nor tensors"),
        ("adapter_model.safetensors", "has no weights: put adapter_model.safetensors or"),
    ],
)
def test_half_an_adapter_is_refused(
    tiny_repo: Path, tmp_path: Path, missing: str, message: str
) -> None:
    write_adapter(tmp_path / "lora", {}, {})
    (tmp_path / "lora" / missing).unlink()
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(tiny_repo, tmp_path / "new", INT4, str(tmp_path / "lora"))


# What is refused


def drop(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: tensor})


def spoil(name: str, value: float) -> Callable[[Weights], object]:
    return lambda weights: weights[name].view(-1)[5].fill_(value)


WRONG_WEIGHTS: list[tuple[Callable[[Weights], object], str]] = [
    (drop(BIAS), f"the weights lack {BIAS};"),
    (put("extra", torch.ones(1)), "the model has no place for extra;"),
    (put(BIAS, torch.ones(31)), rf"{BIAS} in .* the sizes \(31,\), and not \(32,\);"),
    (
        put(DENSE, torch.ones(32, 16).char()),
        f"{DENSE} in model.safetensors is stored as torch.int8",
    ),
]
NOT_FINITE: list[tuple[Callable[[Weights], object], str]] = [
    (spoil(DENSE, torch.nan), f"{DENSE} cannot be quantized: row 0 reaches nan"),
    (spoil(BIAS, torch.inf), f"{BIAS} has values that are not finite in torch.float16"),
    (
        put("lm_head.weight", torch.ones(8192, 32).half()),
        f"{TABLE} and lm_head.weight differ, and config.json ties them",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG_WEIGHTS)
def test_wrong_tensors_are_named_before_anything_is_written(
    source: Path, tmp_path: Path, change: Callable[[Weights], object], message: str
) -> None:
    replace_weights(source, change)
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "new", INT4)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("change", "message"), NOT_FINITE)
def test_wrong_values_are_named_when_they_are_met(
    source: Path, tmp_path: Path, change: Callable[[Weights], object], message: str
) -> None:
    replace_weights(source, change)
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "new", INT4)
    assert not (tmp_path / "new").exists()


def test_a_quantized_folder_is_refused(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "new", INT4)
    with pytest.raises(ValueError, match=r"is torch\.int8: such weights are quantized already"):
        quantize_checkpoint(tmp_path / "new", tmp_path / "newer", PackedFormat(8))


@pytest.mark.parametrize(
    ("file", "fields", "tool"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("config.json", {"quantization_config": {"load_in_8bit": True}}, "another tool"),
        ("quantize_config.json", {}, "AutoGPTQ"),
        ("quant_config.json", {}, "AutoAWQ"),
    ],
)
def test_other_tools_checkpoints_are_refused_by_name(
    source: Path, tmp_path: Path, file: str, fields: dict[str, Any], tool: str
) -> None:
    (source / file).touch()
    old = read_json(source / "config.json") if file == "config.json" else {}
    (source / file).write_text(json.dumps(old | fields))
    with pytest.raises(ValueError, match=f"is quantized already, by {tool}: name the folder"):
        quantize_checkpoint(source, tmp_path / "new", INT4)


def test_a_folder_without_its_vocabulary_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "ice_text.model").unlink()
    with pytest.raises(ValueError, match=r"has no ice_text\.model: copy that of the model"):
        quantize_checkpoint(source, tmp_path / "new", INT4)


def test_an_unknown_generation_is_refused(source: Path, tmp_path: Path) -> None:
    change_json(source / "config.json", vocab_size=8191, auto_map={})
    replace_weights(source, lambda w: w.update({TABLE: w[TABLE][:8191].clone()}))
    sizes = r"a vocab_size of 8191, and the known ones are \[8192, 130528, 150528\]"
    with pytest.raises(ValueError, match=sizes):
        quantize_checkpoint(source, tmp_path / "new", INT4)


def test_a_configuration_that_is_no_json_is_refused(source: Path, tmp_path: Path) -> None:
    for text, message in (("{", "is no JSON file"), ("[]", "holds a list, and not fields")):
        (source / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json {message}"):
            quantize_checkpoint(source, tmp_path / "new", INT4)


def test_columns_that_groups_do_not_divide_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"layers\.0\.attention\.query_key_value has 32 columns, which groups of 64",
    ):
        quantize_checkpoint(source, tmp_path / "new", PackedFormat(4, 64))
    assert not (tmp_path / "new.part").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.ones(1)}}, "holds a dict named model: only tensors may be there"),
        ([torch.ones(1)], "holds no tensors by name: save the model's state_dict"),
        ({"a": Path("b")}, "would run code when it is unpickled, pathlib PosixPath"),
    ],
)
def test_a_torch_file_of_another_kind_is_refused(
    source: Path, tmp_path: Path, content: Any, message: str
) -> None:
    (source / "model.safetensors").unlink()
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin {message}"):
        quantize_checkpoint(source, tmp_path / "new", INT4)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    weights = make_official(tmp_path / "old", 8192)
    shard = tmp_path / "old" / "pytorch_model-00003.bin"
    torch.save(torch.load(shard, weights_only=True) | {BIAS: weights[BIAS]}, shard)
    with pytest.raises(
        ValueError, match=rf"{BIAS} in pytorch_model-0000\d.bin is also in .*-00003.bin: remove"
    ):
        quantize_checkpoint(tmp_path / "old", tmp_path / "new", INT4)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("source", "is .*source or inside it: name a folder elsewhere"),
        ("source/new", "is .*source or inside it: name a folder elsewhere"),
        ("full", "exists and is not empty: remove it"),
        ("full/file", "exists and is not empty"),
        ("taken", r"taken\.part exists and is no unfinished result of this command"),
    ],
)
def test_a_place_that_is_taken_is_refused(
    source: Path, tmp_path: Path, target: str, message: str
) -> None:
    for name in ("full", "taken.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / target, INT4)
    assert (tmp_path / "taken.part" / "file").exists()


def test_an_empty_folder_may_be_the_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    quantize_checkpoint(source, tmp_path / "new", INT4)
    assert load(tmp_path / "new").config.quantization_bit == 4


def test_a_full_disk_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def leave(free: int) -> None:
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)

    leave(10**6)
    message = r"the disk of .*new has 1 MB free, and the result needs 2 MB: make room"
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "a" / "new", INT4)
    assert asked == [tmp_path / "a"] and not (tmp_path / "a").exists()
    leave(staging.SPARE_BYTES + 2 * 10**6)
    quantize_checkpoint(source, tmp_path / "a" / "new", INT4)


# Stops


class Killed(Exception):
    """Stands for a kill at a given point."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Small shards; the function lets a run die while it writes that shard, or never."""
    monkeypatch.setattr(planning, "MAX_SHARD_BYTES", 6000)
    save = conversion.save_file

    def die_at(shard: int) -> None:
        written = []

        def save_or_die(tensors: Weights, path: Path, **options: Any) -> None:
            written.append(path)
            if len(written) == shard:
                path.write_bytes(b"half a sh")
                raise Killed
            save(tensors, path, **options)

        monkeypatch.setattr(conversion, "save_file", save_or_die)
        monkeypatch.setattr(conversion, "written", written, raising=False)

    return die_at


def written() -> list[str]:
    """The shards of the last run, without the ending of an unfinished file."""
    return [path.name.removesuffix(".part") for path in conversion.written]


@pytest.fixture
def stopped(source: Path, tmp_path: Path, cut: Callable[[int], None]) -> Path:
    """What a run leaves that was killed in its third shard; from now on none is."""
    cut(3)
    with pytest.raises(Killed):
        quantize_checkpoint(source, tmp_path / "new", INT4)
    cut(0)
    return tmp_path / "new.part"


def test_the_same_command_goes_on_where_it_stopped(
    source: Path, tmp_path: Path, stopped: Path
) -> None:
    assert not (tmp_path / "new").exists()
    done = {path.name: path.stat().st_mtime_ns for path in stopped.glob("*.safetensors")}
    assert len(done) == 2
    quantize_checkpoint(source, tmp_path / "new", INT4)
    assert {name: (tmp_path / "new" / name).stat().st_mtime_ns for name in done} == done
    assert not stopped.exists() and not done.keys() & set(written())
    quantize_checkpoint(source, tmp_path / "undisturbed", INT4)
    assert hashes(tmp_path / "new") == hashes(tmp_path / "undisturbed")


def test_a_finished_shard_that_has_changed_is_written_again(
    source: Path, tmp_path: Path, stopped: Path
) -> None:
    first, second = sorted(stopped.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    quantize_checkpoint(source, tmp_path / "new", INT4)
    assert first.name in written() and second.name not in written()
    assert_same(tmp_path / "new", load(source).quantize(4))


def test_another_job_starts_anew(source: Path, tmp_path: Path, stopped: Path) -> None:
    quantize_checkpoint(source, tmp_path / "new", PackedFormat(8))
    assert len(written()) == len(list((tmp_path / "new").glob("*.safetensors")))
    assert_same(tmp_path / "new", load(source).quantize(8))


def test_changed_weights_start_anew(source: Path, tmp_path: Path, stopped: Path) -> None:
    replace_weights(source, lambda weights: weights[TABLE].neg_())
    quantize_checkpoint(source, tmp_path / "new", INT4)
    assert len(written()) == len(list((tmp_path / "new").glob("*.safetensors")))
    assert_same(tmp_path / "new", load(source).quantize(4))


def test_what_is_there_counts_as_room(
    source: Path, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"a": 1000, "b": 50}
    left = sum(path.stat().st_size for path in stopped.iterdir())
    plan = planning.make_plan(planning.read_source(source), Form(INT4))
    place = staging.Staging(tmp_path / "new", plan.job())
    assert place.missing_bytes(sizes) == 1050 - left
    assert place.has("model-00001-of-00009.safetensors") == (len(plan.shards) == 9)


def test_a_file_that_does_not_read_back_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rest = conversion._write_rest

    def spoil_a_file(place: staging.Staging, plan: planning.Plan) -> None:
        write_rest(place, plan)
        (place.folder / "model.safetensors").write_bytes(b"lost")

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write_rest", spoil_a_file)
        with pytest.raises(ValueError, match=r"model\.safetensors does not read back as it was"):
            quantize_checkpoint(source, tmp_path / "new", INT4)
    assert not (tmp_path / "new").exists()
    quantize_checkpoint(source, tmp_path / "new", INT4)
    assert_same(tmp_path / "new", load(source).quantize(4))


def test_ctrl_c_says_how_to_go_on(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    command = ["quantize", str(source), str(tmp_path / "new"), "--bits", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "convert", interrupt)
        assert cli.main(command) == 130
    note = f"chatglm: stopped; the same command goes on from {tmp_path / 'new.part'}, or remove it"
    assert capsys.readouterr() == ("", f"\n{note}\n")
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new'}: 4 bits, 1 MB\n"


def test_an_error_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quantize", str(tmp_path), str(tmp_path / "new"), "--bits", "8"]) == 2
    reason = f"{tmp_path} is an empty folder: download a model into it, or name another folder"
    assert capsys.readouterr() == ("", f"chatglm: {reason}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --bits"),
        (["--bits", "3"], "argument --bits: invalid choice: "),
        (["--bits", "4", "--group-size", "16"], "argument --group-size: invalid choice: "),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["quantize", "a", "b", *options])
    err = capsys.readouterr().err
    assert err.startswith(f"chatglm quantize: {message}") and err.count("\n") == 1
