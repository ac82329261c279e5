"""`chatglm check`, what is odd: folders that load all the same, and what that means."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="needs the package")

import torch
from model_folders import change_json, make_official, replace_weights, stored
from safetensors.torch import save_file
from wild_folders import INDEX, change_index, find_codes, find_odd_codes, make_shards, tell

from chatglm import cli
from chatglm.checking import oddities
from chatglm.checking.inspection import inspect_folder


@pytest.fixture
def folder(tiny_repo: Path, tmp_path: Path) -> Path:
    return make_shards(tiny_repo, tmp_path / "model")


def change(**fields: Any) -> Callable[[Path], Any]:
    return lambda folder: change_json(folder / "config.json", **fields)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def leave(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(b"\0" * 3_000_000)


def forget_field(name: str) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        del fields[name]
        (folder / "config.json").write_text(json.dumps(fields))

    return spoil


OLD_MAP = {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}
ODDITIES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "old code": (
        change(auto_map=OLD_MAP),
        "old-code",
        "fail on transformers 4.34 and later: `chat",
    ),
    "a file of the model is missing": (remove("masking_chatglm.py"), "old-code", "`chatglm adopt`"),
    "another release": (
        lambda f: (f / "cache_chatglm.py").write_text("# older\n"),
        "other-release",
        "cache_chatglm.py in ",
    ),
    "no auto_map": (
        forget_field("auto_map"),
        "no-auto-map",
        "trust_remote_code=True finds no code",
    ),
    "no generation settings": (
        remove("generation_config.json"),
        "missing-settings",
        "has no generation_config.json, and gets that of its generation",
    ),
    "no tokenizer settings": (
        remove("tokenizer_config.json"),
        "missing-settings",
        "tokenizer_conf",
    ),
    "no template": (
        remove("chat_template.jinja"),
        "missing-settings",
        "has no chat_template.jinja",
    ),
    "another dtype": (
        change(torch_dtype="float16"),
        "dtype",
        "config.json says float16, and the weights are float32",
    ),
    "plain weights to be packed": (
        change(quantization_bit=4),
        "packed-while-loading",
        "`chatglm quantize` packs them once",
    ),
    "total size": (
        lambda f: change_index(f, metadata={"total_size": 5}),
        "total-size",
        f"{INDEX} says 5 bytes, and the tensors are ",
    ),
    "an optimizer": (leave("optimizer.pt"), "leftovers", "optimizer.pt (3.0 MB)"),
    "a broken download": (
        leave("model.safetensors.incomplete"),
        "leftovers",
        "incomplete (3.0 MB)",
    ),
    "random numbers": (leave("rng_state_0.pth"), "leftovers", "rng_state_0.pth (3.0 MB)"),
    "a pointer of no use": (
        lambda f: (f / "LICENSE").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "pointer",
        "LICENSE is a Git-LFS pointer: fetch it again (git lfs pull)",
    ),
}


@pytest.mark.parametrize("case", ODDITIES)
def test_each_oddity_is_told_and_is_no_problem(folder: Path, case: str) -> None:
    spoil, code, told = ODDITIES[case]
    spoil(folder)
    assert find_codes(folder) == []
    report = inspect_folder(folder)
    assert {p.code for p in report.problems} == {code}
    assert told in tell(report)
    assert cli.main(["check", str(folder)]) == 0


def test_both_kinds_of_weights(folder: Path, tiny_repo: Path) -> None:
    """Safetensors are read, and the shards of torch lie there for nothing, or for a wrong hope."""
    shutil.copy(tiny_repo / "model.safetensors", folder)
    report = inspect_folder(folder)
    assert {p.code for p in report.problems} == {"unread-weights"}
    assert "pytorch_model-00001.bin, pytorch_model-00002.bin: only model.safetensors co" in tell(
        report
    )


def test_shards_that_the_index_does_not_name(folder: Path) -> None:
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model-00009.bin")
    assert find_odd_codes(folder) == {"unread-weights"}
    assert "weights that are not read, pytorch_model-00009.bin: " in tell(inspect_folder(folder))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"eos_token_id": 2, "bos_token_id": 1},
            "bos_token_id 1 and not 130004, eos_token_id 2 and",
        ),
        ({"pad_token_id": 0}, "pad_token_id 0 and not 3"),
    ],
)
def test_the_ids_of_old_configurations(tmp_path: Path, fields: dict[str, int], told: str) -> None:
    make_official(tmp_path / "old", 130528, **fields)
    report = inspect_folder(tmp_path / "old")
    assert "wrong-ids" in [p.code for p in report.problems] and told in tell(report)


def test_float32_weights_take_twice_the_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it matters: 25 GB of an official model saved so by a training."""
    assert inspect_folder(folder).problems == []
    monkeypatch.setattr(oddities, "LARGE_BYTES", 10_000)
    report = inspect_folder(folder)
    assert {p.code for p in report.problems} == {"float32"}
    assert "where float16 takes half: `chatglm merge` or" in tell(report)


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that differ in case alone")
def test_names_that_differ_in_case_alone(folder: Path) -> None:
    (folder / "Config.json").write_text("{}")
    report = inspect_folder(folder)
    assert sorted(p.file for p in report.problems) == ["Config.json", "config.json"]
    assert {p.code for p in report.problems} == {"case-clash"}


def test_half_of_the_weights_in_another_format(tiny_repo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_repo, tmp_path / "mixed")
    replace_weights(folder, lambda w: w.update({n: t.half() for n, t in w.items() if t.dim() > 1}))
    dtypes = inspect_folder(folder).facts["weights"]["dtypes"]
    assert list(dtypes) == ["float16", "float32"]


def test_looking_changes_nothing(folder: Path) -> None:
    def look() -> dict[str, tuple[int, int]]:
        return {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}

    before = look()
    inspect_folder(folder, is_deep=True)
    assert look() == before


def test_a_folder_that_may_not_be_written_to(folder: Path) -> None:
    os.chmod(folder, 0o555)
    try:
        assert find_codes(folder) == []
    finally:
        os.chmod(folder, 0o755)


def test_packed_by_another_tool(tiny_repo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_repo, tmp_path / "gptq")
    weights = stored(folder)
    name = next(n for n in weights if n.endswith("dense_h_to_4h.weight"))
    weights[name.replace("weight", "qweight")] = weights.pop(name).to(torch.int32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    report = inspect_folder(folder)
    assert report.facts["format"]["by"] == "gptq"
    assert find_codes(folder) == ["foreign-format"]
    assert "is quantized already, by gptq: name the folder with the float weights" in tell(report)
