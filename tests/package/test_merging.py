"""`chatglm merge`: a folder with an adapter in its weights, compared with what peft merges."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from model_folders import (
    THIN,
    Weights,
    copy_in_half,
    hashes,
    make_adapter,
    make_official,
    old_name,
    read_json,
    stored,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from chatglm import cli
from chatglm.converting import conversion, planning
from chatglm.converting.conversion import merge_checkpoint, quantize_checkpoint
from chatglm.converting.planning import PackedFormat

TABLE, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
NORM = "transformer.final_layernorm.weight"
DENSE = "transformer.layers.0.attention.dense.weight"
QUERY = "transformer.layers.0.attention.query_key_value.weight"
INDEX = "pytorch_model.bin.index.json"

pytestmark = old_name


@pytest.fixture
def source(tiny_repo: Path, tmp_path: Path) -> Path:
    return copy_in_half(tiny_repo, tmp_path / "source")


@pytest.fixture
def lora(source: Path, tmp_path: Path) -> str:
    make_adapter(source, tmp_path / "lora")
    return str(tmp_path / "lora")


def merge_with_peft(source: Path, lora: Path | str, dtype: torch.dtype) -> Any:
    from peft import PeftModel

    base = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=dtype)
    return PeftModel.from_pretrained(base, lora).merge_and_unload()


def read_archives(folder: Path) -> Weights:
    """All tensors of a folder's torch files, as the original's loader reads them."""
    weights: Weights = {}
    for file in sorted(folder.glob("*.bin")):
        weights |= torch.load(file, weights_only=True)
    return weights


def assert_equal(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_the_weights_are_those_that_peft_merges(
    source: Path, tmp_path: Path, lora: str, dtype: torch.dtype | None, kind: str
) -> None:
    """In the wider of both formats: the source is half."""
    new = tmp_path / "new"
    size = merge_checkpoint(source, new, lora, dtype, kind)
    wider = torch.promote_types(torch.float16, dtype or torch.float16)
    final = dtype or torch.float16
    wanted = merge_with_peft(source, lora, wider).to(final).state_dict()
    found = stored(new) if kind == "safetensors" else read_archives(new)
    if kind == "safetensors":
        del wanted[HEAD]  # such files cannot hold a tensor twice
    assert_equal(found, wanted)
    assert size == sum(tensor.nbytes for name, tensor in found.items() if name != HEAD)
    assert not torch.equal(found[QUERY].half(), stored(source)[QUERY])
    fields = read_json(new / "config.json")
    assert fields["torch_dtype"] == str(final).removeprefix("torch.")
    assert fields["quantization_bit"] == 0
    assert {path.suffix for path in new.glob("*model.*") if "ice" not in path.name} == {f".{kind}"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_folder_answers_as_the_model_with_its_adapter(
    source: Path, tmp_path: Path, lora: str, kind: str
) -> None:
    from peft import PeftModel

    merge_checkpoint(source, tmp_path / "new", lora, torch.float32, kind)
    model, report = AutoModel.from_pretrained(
        tmp_path / "new", trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new", trust_remote_code=True)
    ids = tokenizer(["你好，世界"], return_tensors="pt")["input_ids"]
    base = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        plain = base.eval()(ids).logits
        wanted = PeftModel.from_pretrained(base, lora).eval()(ids).logits
        found = model.eval()(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 0.1


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_taken_over(source: Path, tmp_path: Path, bias: str) -> None:
    make_adapter(source, tmp_path / "lora", bias=bias)
    merge_checkpoint(source, tmp_path / "new", str(tmp_path / "lora"))
    wanted = merge_with_peft(source, tmp_path / "lora", torch.float16).state_dict()
    del wanted[HEAD]
    assert_equal(stored(tmp_path / "new"), wanted)
    before = stored(source)
    changed = {name for name in wanted if not torch.equal(wanted[name], before[name])}
    assert QUERY.replace("weight", "bias") in changed
    assert (NORM.replace("weight", "bias") in changed) == (bias == "all")


def test_an_official_folder_keeps_its_names_its_formats_and_its_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide norms stay wide; the buffers that no code reads are left out."""
    monkeypatch.setattr(planning, "MAX_SHARD_BYTES", 2000)
    weights = make_official(tmp_path / "old", 130528)
    rank, width = 3, THIN["hidden_size"]
    factors = {"lora_A": torch.randn(rank, width), "lora_B": torch.randn(3 * width, rank)}
    layer = "base_model.model.transformer.layers.0.attention.query_key_value"
    (tmp_path / "lora").mkdir()
    tensors = {f"{layer}.{name}.weight": tensor for name, tensor in factors.items()}
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    new = tmp_path / "new"
    merge_checkpoint(tmp_path / "old", new, str(tmp_path / "lora"), kind="bin")
    wanted = {name: tensor for name, tensor in weights.items() if "inv_freq" not in name}
    wanted[QUERY] = wanted[QUERY].clone().add_((factors["lora_B"] @ factors["lora_A"]) * 2)
    assert_equal(read_archives(new), wanted)
    assert wanted[NORM].dtype == torch.float32 and wanted[DENSE].dtype == torch.float16
    shards = sorted(path.name for path in new.glob("*.bin"))
    count = len(shards)
    assert shards == [f"pytorch_model-{n:05d}-of-{count:05d}.bin" for n in range(1, count + 1)]
    index = read_json(new / INDEX)
    places = {name: shard for shard in shards for name in torch.load(new / shard)}
    assert index["weight_map"] == places and count > 3
    total = sum(tensor.nbytes for name, tensor in wanted.items() if name != HEAD)
    assert index["metadata"] == {"total_size": total}
    table = wanted[TABLE].nbytes  # and not twice as large
    assert table < (new / places[HEAD]).stat().st_size < 1.1 * table
    assert read_json(new / "config.json")["torch_dtype"] == "float16"
    assert (new / "modeling_chatglm.py").read_bytes() == (ROOT / "modeling_chatglm.py").read_bytes()


def test_a_value_too_large_for_the_new_format_is_named(
    source: Path, tmp_path: Path, lora: str
) -> None:
    weights = {name: tensor.float() for name, tensor in stored(source).items()}
    weights[DENSE][0, 0] = 1e6
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    message = rf"{DENSE} has values that are not finite in torch.float16: .*wider format"
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(source, tmp_path / "new", lora, torch.float16)
    assert not (tmp_path / "new").exists()
    merge_checkpoint(source, tmp_path / "wide", lora)
    assert stored(tmp_path / "wide")[DENSE][0, 0] == 1e6


def test_packed_weights_and_other_adapters_are_refused(
    source: Path, tmp_path: Path, lora: str
) -> None:
    quantize_checkpoint(source, tmp_path / "int4", PackedFormat(4))
    with pytest.raises(ValueError, match="such weights are quantized already; name the folder"):
        merge_checkpoint(tmp_path / "int4", tmp_path / "new", lora)
    with pytest.raises(ValueError, match=r"has neither adapter_config\.json nor tensors"):
        merge_checkpoint(source, tmp_path / "new", str(source))
    fields = read_json(Path(lora, "adapter_config.json"))
    for more, message in (
        ({"use_dora": True}, "has no magnitude for .* says use_dora=True: one of the two files"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.*, and only plain LoRA"),
    ):
        Path(lora, "adapter_config.json").write_text(json.dumps(fields | more))
        with pytest.raises(ValueError, match=message):
            merge_checkpoint(source, tmp_path / "new", lora)
    Path(lora, "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="or inside it: name a folder elsewhere"):
        merge_checkpoint(source, source / "new", lora)
    assert not (tmp_path / "new.part").exists()


class Killed(Exception):
    """Stands for a kill at a given point."""


def test_a_stopped_merge_goes_on_and_another_one_starts_anew(
    source: Path, tmp_path: Path, lora: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the number format of one tensor differs, and no size."""
    monkeypatch.setattr(planning, "MAX_SHARD_BYTES", 6000)
    weights = stored(source)
    weights[DENSE] = weights[DENSE].bfloat16()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    written: list[str] = []
    save = conversion._save

    def save_or_die(tensors: Weights, kind: str, path: Path) -> None:
        written.append(path.name.removesuffix(".part"))
        if len(written) == 3:
            path.write_bytes(b"half a sh")
            raise Killed
        save(tensors, kind, path)

    monkeypatch.setattr(conversion, "_save", save_or_die)
    with pytest.raises(Killed):
        merge_checkpoint(source, tmp_path / "new", lora, kind="bin")
    shutil.copytree(tmp_path / "new.part", tmp_path / "other.part")
    new = tmp_path / "new"
    merge_checkpoint(source, new, lora, kind="bin")
    shards = len(list(new.glob("*.bin")))
    assert len(written) == 1 + shards and written.count(written[2]) == 2
    assert read_archives(new)[DENSE].dtype == torch.bfloat16
    merge_checkpoint(source, tmp_path / "undisturbed", lora, kind="bin")
    assert hashes(new) == hashes(tmp_path / "undisturbed")
    before = len(written)
    merge_checkpoint(source, tmp_path / "other", lora, torch.float16, "bin")
    assert len(written) == before + shards
    assert read_archives(tmp_path / "other")[DENSE].dtype == torch.float16
    assert read_json(tmp_path / "other" / "config.json") == read_json(new / "config.json")


def test_the_command(
    source: Path, tmp_path: Path, lora: str, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    options = ["--lora", lora, "--format", "bin", "--dtype", "float32"]
    assert cli.main(["merge", str(source), str(new), *options]) == 0
    assert capsys.readouterr().out == f"{new}: merged, 1 MB\n"
    assert read_archives(new)[TABLE].dtype == torch.float32
    assert cli.main(["merge", str(source), str(new), "--lora", lora]) == 2
    error = capsys.readouterr().err
    assert error == f"chatglm: {new} exists and is not empty: remove it, or name another folder\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --lora"),
        (["--lora", "c", "--format", "gguf"], "argument --format: invalid choice: "),
        (["--lora", "c", "--dtype", "int8"], "argument --dtype: invalid choice: "),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["merge", "a", "b", *options])
    err = capsys.readouterr().err
    assert err.startswith(f"chatglm merge: {message}") and err.count("\n") == 1


def test_an_adapter_of_zeros_changes_nothing(source: Path, tmp_path: Path, lora: str) -> None:
    file = Path(lora, "adapter_model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    save_file(zeros, file)
    merge_checkpoint(source, tmp_path / "new", lora)
    before = stored(source)
    assert_equal(stored(tmp_path / "new"), {n: t for n, t in before.items() if n != HEAD})
