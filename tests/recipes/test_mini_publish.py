"""The recipe's checkpoint: names, sizes, float16, and that the model loads it."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from conftest import ROOT
from torch import Tensor

from recipes.mini.publish import INDEX_NAME, MAX_SHARD_BYTES, build_files, main, read_weights
from recipes.mini.train import save_state

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    fields = json.loads((ROOT / "config.json").read_text())
    fields |= {"num_layers": 2, "hidden_size": 64, "inner_hidden_size": 128}
    return ChatGLMForConditionalGeneration(ChatGLMConfig(**fields))


@pytest.fixture
def work(model: ChatGLMForConditionalGeneration, tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    save_state(folder / "state.pt", step=1, seconds=0.5, model=model.state_dict(), optimizer={})
    return folder


def load_shards(folder: Path) -> dict[str, Weights]:
    return {
        path.name: torch.load(path, weights_only=True)
        for path in sorted(folder.glob("pytorch_model-*.bin"))
    }


def test_the_index_tells_the_truth(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.mini.publish.build_files", lambda w: build_files(w, 1_100_000))
    assert main(["--work", str(work), "--out", str(tmp_path)]) == 0
    shards = load_shards(tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    number = len(shards)
    assert number == 3
    assert [*shards] == [f"pytorch_model-{k:05d}-of-00003.bin" for k in (1, 2, 3)]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards.values()]
    assert max(sizes) <= 1_100_000
    assert index["metadata"] == {"total_size": sum(sizes)}
    places = {weight: name for name, shard in shards.items() for weight in shard}
    assert index["weight_map"] == places
    assert [*index["weight_map"]] == sorted(places)


def test_names_are_the_official_ones(work: Path, model: ChatGLMForConditionalGeneration) -> None:
    def shorten(name: str) -> str:
        return re.sub(r"\d+", "N", name)

    names = set(read_weights(work / "state.pt"))
    assert names == set(model.state_dict())
    official = json.loads((ROOT / "chatglm/presets/chatglm-6b" / INDEX_NAME).read_text())[
        "weight_map"
    ]
    expected = {shorten(name) for name in official if "inv_freq" not in name}
    assert {shorten(name) for name in names} == expected


def test_weights_are_float16_and_the_tied_matrix_is_stored_twice(
    work: Path, model: ChatGLMForConditionalGeneration
) -> None:
    weights = read_weights(work / "state.pt")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    head, embedding = weights["lm_head.weight"], weights["transformer.word_embeddings.weight"]
    assert torch.equal(head, embedding) and head.data_ptr() != embedding.data_ptr()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor.half())


def test_the_model_loads_what_is_written(
    work: Path, model: ChatGLMForConditionalGeneration, tmp_path: Path
) -> None:
    model.config.save_pretrained(tmp_path)
    assert main(["--work", str(work), "--out", str(tmp_path)]) == 0
    loaded, info = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight


def test_files_are_the_same_every_time_and_their_sums_are_printed(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for name in ("one", "two"):
        assert main(["--work", str(work), "--out", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    sums = {line.split()[2]: line.split()[0] for line in printed[0].splitlines()}
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert INDEX_NAME in sums


def test_shards_of_an_older_cut_go_and_other_files_stay(work: Path, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00009.bin").write_bytes(b"old")
    (tmp_path / "config.json").write_text("{}")
    assert main(["--work", str(work), "--out", str(tmp_path)]) == 0
    assert [*load_shards(tmp_path)] == ["pytorch_model-00001-of-00001.bin"]
    assert (tmp_path / "config.json").read_text() == "{}"
    assert not [*tmp_path.glob("*.part")]


def test_a_write_that_fails_leaves_the_old_checkpoint(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--work", str(work), "--out", str(tmp_path)]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    real_write = Path.write_bytes

    def write_to_a_full_disk(path: Path, content: bytes) -> int:
        if INDEX_NAME in path.name:
            raise OSError("no space left")
        return real_write(path, content[:100])

    monkeypatch.setattr(Path, "write_bytes", write_to_a_full_disk)
    with pytest.raises(OSError, match="no space left"):
        main(["--work", str(work), "--out", str(tmp_path)])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_the_limits_hold_for_a_tensor_larger_than_a_shard() -> None:
    weights = {"a": torch.zeros(5).half(), "b": torch.zeros(50).half(), "c": torch.zeros(5).half()}
    files = build_files(weights, limit=20)
    index = json.loads(files[INDEX_NAME])
    assert [*index["weight_map"].values()] == [*files][:3]
    assert MAX_SHARD_BYTES <= 8_000_000


def test_there_must_be_a_state_and_its_weights_must_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--work", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert re.fullmatch(r"error: .*state\.pt does not exist: .*\n", capsys.readouterr().err)
    too_large = {"transformer.x": torch.tensor([1.0, 70000.0])}
    save_state(tmp_path / "state.pt", step=1, model=too_large)
    assert main(["--work", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "transformer.x reaches 70000.0, float16 ends at 65504" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
