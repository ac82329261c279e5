"""Checkpoints: their files, tensors read block by block, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b import checkpoint_chatglm
from chatglm_6b.checkpoint_chatglm import list_weight_files, open_shards, read_weight_map


def test_the_files_of_the_weights_are_told_as_transformers_looks_for_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no weights: put"):
        list_weight_files(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    weight_map = '"weight_map": {"a": "two.bin", "b": "one.bin", "c": "two.bin"}'
    index.write_text(f"{{{weight_map}}}")  # transformers would end in a bare KeyError
    with pytest.raises(ValueError, match=r'index.json has no "metadata".*write "metadata": {}'):
        list_weight_files(tmp_path)
    index.write_text(f'{{"metadata": {{}}, {weight_map}}}')
    assert list_weight_files(tmp_path) == ["one.bin", "two.bin"]
    (tmp_path / "model.safetensors").touch()
    assert list_weight_files(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "shard", ["../a.bin", "/a.bin", "b/a.bin", "b\\\\a.bin", ".a", "*.bin", ""]
)
def test_an_index_names_files_beside_it(tmp_path: Path, shard: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"a": "{shard}"}}}}')
    with pytest.raises(ValueError, match=r"index\.json puts a into .*: take the index that came"):
        read_weight_map(index)


def test_a_stored_tensor_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_chatglm, "WEIGHTS_AT_ONCE", 10)
    file, values = tmp_path / "a.bin", torch.arange(21.0).view(7, 3)
    torch.save({"a": values, "b": values.half(), "c": values + 1}, file)
    stored = open_shards([file])
    assert [rows.stop for rows, _ in stored["a"].iter_blocks()] == [3, 6, 7]
    assert (stored["a"].shape, stored["b"].dtype) == ((7, 3), torch.float16)
    assert (stored["a"].name, stored["a"].file, str(stored["a"])) == ("a", file, "a in a.bin")
    for dtype in (None, torch.float16):
        assert torch.equal(stored["a"].read(dtype), values.to(dtype or torch.float32))
    assert stored["a"].equals(stored["b"]) and not stored["a"].equals(stored["c"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds no tensors by name: save the model's state_dict"),
        ({}, "holds no tensors by name"),
        ({"model": {"a": torch.ones(1)}}, "holds a dict named model: only tensors may be there"),
        ({"a": Path("b")}, "cannot be read: .*; fetch it again"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=rf"a\.bin {message}"):
        open_shards([tmp_path / "a.bin"])
