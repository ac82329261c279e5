"""`chatglm check`, what it is: every kind of folder that people name, told without loading it."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("chatglm", reason="needs the package")

import torch
from conftest import SHARED, build_model
from model_folders import THIN, change_json, make_adapter, make_official, old_name
from wild_folders import STRANGERS, find_codes, find_odd_codes, make_prefix, make_shards, tell

from chatglm import cli
from chatglm.checking.command import format_table
from chatglm.checking.inspection import inspect_folder

VOCABULARIES = {130528: "ice_text.v1.1.model", 150528: "ice_text.v0.model"}
GENERATIONS = {130528: "current (v1.1.0)", 150528: "first release"}


@pytest.fixture
def folder(tiny_repo: Path, tmp_path: Path) -> Path:
    return make_shards(tiny_repo, tmp_path / "model")


def find_vocabulary(rows: int) -> Path:
    """The official vocabulary of a generation, which is not part of the repository."""
    file = SHARED / "tokenizers" / VOCABULARIES[rows]
    if not file.is_file():
        pytest.skip("needs the official vocabularies")
    return file


def test_a_folder_of_ours(folder: Path) -> None:
    report = inspect_folder(folder, is_deep=True)
    assert (report.kind, report.name, report.problems) == ("model", "the first ChatGLM-6B", [])
    facts = report.facts
    assert facts["generation"] == "a vocabulary of its own"
    assert facts["rows"] == {"configuration": 8192, "embedding": 8192, "vocabulary": 8192}
    assert facts["weights"]["files"] == ["pytorch_model-00001.bin", "pytorch_model-00002.bin"]
    assert facts["weights"]["dtypes"] == {"float32": facts["weights"]["bytes"]}
    assert not facts["format"]["is_packed"] and facts["format"]["bits"] == 0


@pytest.mark.parametrize("rows", VOCABULARIES)
def test_both_official_generations(tmp_path: Path, rows: int) -> None:
    make_official(tmp_path / "old", rows, model_type="chatglm")
    shutil.copy(find_vocabulary(rows), tmp_path / "old" / "ice_text.model")
    report = inspect_folder(tmp_path / "old", is_deep=True)
    assert find_codes(tmp_path / "old") == []
    assert report.facts["generation"] == GENERATIONS[rows]
    # The image ids of the first generation are counted: a row each.
    assert report.facts["rows"]["vocabulary"] == rows - 130528 + 130344
    assert set(report.facts["weights"]["dtypes"]) == {"float16", "float32"}
    assert find_odd_codes(tmp_path / "old") == {"old-code", "missing-settings", "wrong-ids"}


@pytest.mark.parametrize("rows", VOCABULARIES)
def test_a_vocabulary_of_another_model_answers_wrongly_and_is_a_problem(
    tmp_path: Path, rows: int
) -> None:
    """The small model's vocabulary beside official weights: chat would be silent nonsense."""
    make_official(tmp_path / "old", rows)
    report = inspect_folder(tmp_path / "old")
    assert report.problems[0].code == "vocabulary-of-another"
    assert f"gmask_token_id {rows - 130528 + 7849}, and config.json {rows - 527}" in tell(report)


@pytest.mark.parametrize(("rows", "images"), [(130528, 20000), (150528, 0)])
def test_two_generations_in_one_folder(tmp_path: Path, rows: int, images: int) -> None:
    make_official(tmp_path / "old", rows)
    shutil.copy(find_vocabulary(rows), tmp_path / "old" / "ice_text.model")
    (tmp_path / "old" / "tokenizer_config.json").write_text(
        json.dumps({"num_image_tokens": images})
    )
    assert "generations-mixed" in find_codes(tmp_path / "old")
    # The commands are told before they load, and so before a wrong answer.
    with pytest.raises(ValueError, match=f"num_image_tokens {images}, and the {rows} rows of conf"):
        from chatglm.loading import load_model

        load_model(tmp_path / "old", device="cpu")


@pytest.mark.parametrize(("bits", "embeddings"), [(4, False), (4, True), (8, False)])
def test_official_packed_folders(tmp_path: Path, bits: int, embeddings: bool) -> None:
    """`-int4`, `-int4-qe` and `-int8`: one archive, a scale a row."""
    folder = tmp_path / "packed"
    make_official(folder, 130528)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    model = build_model(**THIN, vocab_size=130528).half()
    model.quantize(bits, embeddings=embeddings)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    packing = {"quantization_bit": bits, "quantization_embeddings": embeddings}
    change_json(folder / "config.json", **packing)
    shutil.copy(find_vocabulary(130528), folder / "ice_text.model")
    report = inspect_folder(folder, is_deep=True)
    assert find_codes(folder) == []
    found = report.facts["format"]
    assert (found["bits"], found["is_packed"], found["embeddings"]) == (bits, True, embeddings)
    assert found["is_official"] and not found["group_size"]
    # The configuration of another format is a problem, with the right value in it.
    change_json(folder / "config.json", quantization_bit=12 - bits)
    assert f"set quantization_bit to {bits}" in tell(inspect_folder(folder))


@pytest.mark.parametrize("has_network", [False, True])
def test_a_prefix_alone_beneath_and_beside(folder: Path, has_network: bool) -> None:
    beside = make_prefix(folder.parent / "checkpoint-500", 4, has_network)
    beneath = make_prefix(folder / "checkpoint-3000", 8, has_network)
    report = inspect_folder(beside, is_deep=True)
    assert (report.kind, find_codes(beside)) == ("prefix", [])
    expected = {"length": 4, "has_network": has_network, "configuration": 4}
    assert report.facts["prefix"] == expected
    assert inspect_folder(folder).facts["prefixes"] == [str(beneath), str(beside)]
    with pytest.raises(ValueError, match=r"is a P-Tuning prefix and no model, .*: name the folder"):
        from chatglm.loading import check_model_folder

        check_model_folder(beside)


@old_name
def test_a_lora_adapter_and_of_which_base(tiny_repo: Path, tmp_path: Path) -> None:
    make_adapter(tiny_repo, tmp_path / "lora")
    report = inspect_folder(tmp_path / "lora", is_deep=True)
    assert (report.kind, find_codes(tmp_path / "lora")) == ("adapter", [])
    adapter = report.facts["adapter"]
    assert (adapter["peft_type"], adapter["r"], adapter["lora_alpha"]) == ("LORA", 3, 7)
    assert adapter["base_model_name_or_path"] == str(tiny_repo)
    assert adapter["target_modules"] == ["query_key_value"]
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"")
    assert find_codes(tmp_path / "lora") == ["broken-weights"]
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    assert find_codes(tmp_path / "lora") == ["no-weights"]


def test_an_adapter_of_a_stranger(tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "lora").mkdir()
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gpt2")}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(fields))
    torch.save({"a.lora_A.weight": torch.ones(1, 2)}, tmp_path / "lora" / "adapter_model.bin")
    report = inspect_folder(tmp_path / "lora")
    assert [p.code for p in report.problems] == ["base"]
    assert "gpt2, which is a model of type gpt2" in tell(report)


def test_a_reward_model_and_what_ppo_leaves(tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    make_official(
        folder, 320, **{f"{name}_token_id": 3 for name in ("mask", "gmask", "bos", "eos")}
    )
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    model = build_model("ChatGLMForSequenceClassification", **THIN, num_labels=1)
    model.save_pretrained(folder)
    report = inspect_folder(folder)
    assert report.kind == "reward model"
    assert "tensors" not in find_codes(folder)
    (folder / "value_head.safetensors").write_bytes(b"")
    assert inspect_folder(folder).facts["stage"] == "ppo"


def test_a_reward_model_does_not_chat(tiny_repo: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from chatglm.door import package_code
    from chatglm.loading import check_model_folder, load_model

    folder = shutil.copytree(tiny_repo, tmp_path / "reward")
    with package_code():
        model = AutoModelForSequenceClassification.from_pretrained(tiny_repo, num_labels=1)
        model.save_pretrained(folder)
    assert inspect_folder(folder).kind == "reward model" and find_codes(folder) == []
    check_model_folder(folder)
    with pytest.raises(ValueError, match="is a reward model or classifier, which gives scores"):
        load_model(folder, device="cpu")


def test_the_card_tells_the_stage_and_names_tell_forks(folder: Path) -> None:
    card = "---\nlicense: other\ntags:\n- chatglm\n- sft\nbase_model: THUDM/chatglm-6b\n---\n"
    (folder / "README.md").write_text(card)
    facts = inspect_folder(folder).facts
    assert (facts["stage"], facts["origin"]) == ("sft", "THUDM/chatglm-6b")
    change_json(folder / "config.json", _name_or_path="fb700/chatglm-fitness-RLHF")
    assert inspect_folder(folder).facts["origin"] == "fb700/chatglm-fitness-RLHF"


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_by_name(tmp_path: Path, name: str) -> None:
    fields, called = STRANGERS[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    report = inspect_folder(tmp_path)
    assert called in report.name
    assert [p.code for p in report.problems] == ["not-the-family"]


def write_archive(file: Path) -> None:
    torch.save({"a": torch.ones(1)}, file)


def test_folders_without_a_model_say_what_they_are(tiny_repo: Path, tmp_path: Path) -> None:
    def look() -> tuple[str, str]:
        report = inspect_folder(tmp_path)
        assert [p.code for p in report.problems] == ["not-the-family"]
        return report.kind, tell(report)

    assert look() == (
        "empty",
        f"{tmp_path} is an empty folder: download a model into it, or name another folder",
    )
    write_archive(tmp_path / "pytorch_model.bin")
    assert look()[0] == "no config" and "it has no config.json" in look()[1]
    (tmp_path / "chatglm-ggml.bin").write_bytes(b"ggml\1\0\0\0")
    assert look()[0] == "other runtime" and "chatglm-ggml.bin is a GGML file" in look()[1]
    (tmp_path / "chatglm-ggml.bin").unlink()
    (tmp_path / "q4_0.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert look()[0] == "other runtime" and "q4_0.gguf is a GGUF file" in look()[1]
    (tmp_path / "q4_0.gguf").unlink()
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_repo / "config.json", tmp_path / name)
    assert look()[0] == "parent" and "but model folders in it, a, b; name one of" in look()[1]
    (tmp_path / "latest").write_text("250000")
    assert look()[0] == "megatron" and "Megatron, SAT or DeepSpeed" in look()[1]


def test_the_cache_of_the_hub(folder: Path) -> None:
    """The cache is no model folder; a revision in it is one, though its files are links."""
    cache = folder.parent / "models--THUDM--chatglm-6b"
    revision = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    revision.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (revision / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    report = inspect_folder(cache)
    assert report.kind == "hub cache" and "snapshots/0123abc in it: name the folder" in tell(report)
    assert inspect_folder(revision).problems == []


def test_what_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("a", "b")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for name, line in {
        tmp_path / "pytorch_model.bin": "is no folder but a weight file: name the folder",
        tmp_path / "m.gguf": "is no folder but a GGUF file of llama.cpp: name the folder of the",
        "THUDM/chatglm-6b": "is no folder, but may be a name on the Hub: download it (hf download",
        tmp_path / "nowhere": "is no folder: name a model folder on this machine",
        "~nobody-of-this-name/x": "is no folder: ",
    }.items():
        assert cli.main(["check", str(name)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"chatglm: {name} {line}") and err.count("\n") == 1


def test_a_table_for_people_and_an_object_for_programs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out == format_table(inspect_folder(folder))
    assert out.splitlines()[0].split() == ["folder", str(folder)]
    assert out.splitlines()[-1] == "no problems, nothing odd"
    (folder / "pytorch_model-00002.bin").unlink()
    (folder / "ice_text.model").unlink()
    assert cli.main(["check", str(folder), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["folder"], told["kind"]) == (str(folder), "model")
    problems = {problem["code"]: problem for problem in told["problems"]}
    assert problems.keys() == {"missing-shard", "no-vocabulary"}
    assert problems["missing-shard"] == {
        "code": "missing-shard",
        "severity": "problem",
        "file": "pytorch_model-00002.bin",
        "what": f"{folder} misses the shard pytorch_model-00002.bin",
        "remedy": "download it again",
    }
