"""`chatglm check`, is it whole: files, tensors, values; every fault at once, none of them run."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="needs the package")

import torch
from model_folders import change_json, read_json, replace_weights, stored
from safetensors.torch import save_file
from wild_folders import INDEX, POINTER, change_index, find_codes, find_odd_codes, make_shards, tell

from chatglm.checking.inspection import inspect_folder
from chatglm.checking.pickles import find_foreign_code
from chatglm.checkpoints.checksums import hash_file, write_sums

FIRST, SECOND = "pytorch_model-00001.bin", "pytorch_model-00002.bin"
HTML = b"<!DOCTYPE html><html><head><title>504 Gateway Time-out</title></head></html>"


@pytest.fixture
def folder(tiny_repo: Path, tmp_path: Path) -> Path:
    """A model folder with two shards of torch, to be spoiled."""
    return make_shards(tiny_repo, tmp_path / "model")


@pytest.fixture
def safe_folder(tiny_repo: Path, tmp_path: Path) -> Path:
    """A model folder with one safetensors file, to be spoiled."""
    return shutil.copytree(tiny_repo, tmp_path / "safe")


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, at: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:at])


def change_shard(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        weights = torch.load(folder / name, weights_only=True)
        change(weights)
        torch.save(weights, folder / name)

    return spoil


def map_to(place: Any) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        names = read_json(folder / INDEX)["weight_map"]
        change_index(folder, weight_map=dict.fromkeys(names, place))

    return spoil


NORM = "transformer.final_layernorm.weight"
# What is done to a folder, the code of the fault, what is told.
FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no shard": (lambda f: (f / SECOND).unlink(), "missing-shard", f"misses the shard {SECOND}"),
    "pointer": (write(SECOND, POINTER), "broken-weights", "a Git-LFS pointer: fetch it again (git"),
    "page": (write(SECOND, HTML), "broken-weights", "but a web page: download it again"),
    "nothing": (
        write(SECOND, b""),
        "broken-weights",
        "(0 bytes) is no complete weight file, but an",
    ),
    "message": (write(SECOND, b'{"error": "busy"}'), "broken-weights", "but a text: download it"),
    "cut": (cut(SECOND, 2000), "broken-weights", "but a broken download: download it again"),
    "gzip": (write(SECOND, b"\x1f\x8b\x08\0"), "broken-weights", "a compressed file: unpack it"),
    "noise": (write(SECOND, b"\xff\xfe\0\x80"), "broken-weights", "but bytes of no known form"),
    "index of nothing": (write(INDEX, b"{}"), "no-weights", "has the weight_map None"),
    "index in a list": (write(INDEX, b"[]"), "no-weights", "holds a list, and not fields by name"),
    "index of numbers": (map_to(3), "no-weights", "into 3, and shards lie beside it"),
    "index upwards": (map_to("../a.bin"), "no-weights", "into '../a.bin', and shards lie beside"),
    "index absolute": (map_to("/etc/a.bin"), "no-weights", "into '/etc/a.bin', and shards lie"),
    "index page": (write(INDEX, HTML), "no-weights", f"{INDEX} is no JSON file"),
    "no index": (lambda f: (f / INDEX).unlink(), "no-index", f"has 2 shards, {FIRST} for one, and"),
    "tensor missing": (change_shard(FIRST, lambda w: w.pop(next(iter(w)))), "tensors", "the weigh"),
    "tensor too many": (
        change_shard(FIRST, lambda w: w.update({"transformer.more": torch.ones(1)})),
        "tensors",
        "the model has no place for transformer.more",
    ),
    "tensor of another size": (
        change_shard(FIRST, lambda w: w.update({n: torch.ones(7) for n in w if "dense.bias" in n})),
        "tensors",
        "with the sizes (7,), and not (",
    ),
    "tensor twice": (
        change_shard(
            SECOND, lambda w: w.update({"transformer.word_embeddings.weight": torch.ones(8192, 32)})
        ),
        "tensor-twice",
        f"transformer.word_embeddings.weight in {FIRST} is also in ",
    ),
    "number in a shard": (
        change_shard(FIRST, lambda w: w.update(a=3)),
        "broken-weights",
        "holds a",
    ),
    "list of tensors": (
        lambda f: torch.save([torch.ones(1)], f / FIRST),
        "broken-weights",
        "holds no tensors by name",
    ),
    "vocabulary pointer": (
        write("ice_text.model", POINTER),
        "broken-vocabulary",
        "Git-LFS pointer",
    ),
    "vocabulary cut": (
        cut("ice_text.model", 9000),
        "broken-vocabulary",
        "is truncated: no settings",
    ),
    "vocabulary page": (write("ice_text.model", HTML), "broken-vocabulary", "is no SentencePiece"),
    "vocabulary gone": (lambda f: (f / "ice_text.model").unlink(), "no-vocabulary", "has no ice_t"),
    "settings pointer": (
        write("tokenizer_config.json", POINTER),
        "broken-settings",
        "tokenizer_config.json is a Git-LFS pointer and no JSON file",
    ),
    "generation cut": (write("generation_config.json", b"{"), "broken-settings", "is no JSON file"),
    "configuration pointer": (
        write("config.json", POINTER),
        "configuration",
        "Git-LFS pointer and",
    ),
    "configuration empty": (
        write("config.json", b""),
        "configuration",
        "an empty file and no JSON",
    ),
    "fewer blocks": (
        lambda f: change_json(f / "config.json", num_layers=1),
        "sizes",
        "has num_layers 1, and the weights 2",
    ),
    "prefix of the configuration alone": (
        lambda f: change_json(f / "config.json", pre_seq_len=4),
        "tensors",
        "the weights lack transformer.prefix_encoder.embedding.weight",
    ),
    "bits of the configuration alone": (
        lambda f: change_json(f / "config.json", quantization_bit=3),
        "configuration",
        "quantization_bit must be one of (0, 4, 8), got 3",
    ),
    "sums of something else": (write("SHA256SUMS", b"no sums\n"), "sums", "is 'no sums', and not"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_is_told(folder: Path, case: str) -> None:
    spoil, code, told = FAULTS[case]
    assert find_codes(folder) == []
    spoil(folder)
    report = inspect_folder(folder)
    assert code in [p.code for p in report.problems if p.severity == "problem"]
    assert told in tell(report)
    for problem in report.problems:
        assert problem.remedy and problem.what and "\n" not in str(problem)


SAFE_FAULTS = {
    "pointer": (write("model.safetensors", POINTER), "a Git-LFS pointer"),
    "cut": (cut("model.safetensors", -9), "a broken download"),
    "page": (write("model.safetensors", HTML), "a web page"),
    "torch inside": (
        lambda f: torch.save({"a": torch.ones(1)}, f / "model.safetensors"),
        "an archive of torch: give it its ending .bin",
    ),
}


@pytest.mark.parametrize("case", SAFE_FAULTS)
def test_faults_of_a_safetensors_file(safe_folder: Path, case: str) -> None:
    spoil, told = SAFE_FAULTS[case]
    spoil(safe_folder)
    report = inspect_folder(safe_folder)
    assert find_codes(safe_folder) == ["broken-weights"] and told in tell(report)


def test_safetensors_by_the_name_of_torch(safe_folder: Path) -> None:
    (safe_folder / "model.safetensors").rename(safe_folder / "pytorch_model.bin")
    assert "a safetensors file: give it its ending .sa" in tell(inspect_folder(safe_folder))


def test_all_faults_at_once(folder: Path) -> None:
    for case in ("pointer", "vocabulary pointer", "generation cut"):
        FAULTS[case][0](folder)
    change_json(folder / "config.json", num_layers="two")
    (folder / FIRST).unlink()
    codes = {"broken-weights", "missing-shard", "broken-vocabulary", "broken-settings"}
    assert set(find_codes(folder)) == codes | {"configuration"}


def test_a_file_of_torch_before_its_archives(folder: Path) -> None:
    weights = torch.load(folder / FIRST, weights_only=True)
    torch.save(weights, folder / FIRST, _use_new_zipfile_serialization=False)
    report = inspect_folder(folder)
    assert find_codes(folder) == ["broken-weights"]
    assert "is no complete weight file, but a weight file of torch before 1.6: write it" in tell(
        report
    )
    assert find_foreign_code(folder / FIRST) == []


class Malicious:
    """Would leave a file where it was unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_code_is_told_and_not_run(folder: Path, is_archive: bool, protocol: int) -> None:
    mark = folder.parent / "ran"
    content = {"a": torch.ones(1), "b": Malicious(mark)}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_archive}
    torch.save(content, folder / SECOND, **options)
    found = find_foreign_code(folder / SECOND)
    assert found == (
        ["posix mkdir"] if protocol == 2 else ["a name that is put together on the stack"]
    )
    report = inspect_folder(folder, is_deep=True)
    assert not mark.exists()
    if is_archive:
        assert "would run code when it is unpickled, " + found[0] in tell(report)
        assert find_codes(folder) == ["pickled-code"]
    from chatglm.loading import check_model_folder

    with pytest.raises(ValueError, match=r"would run code|before 1.6"):
        check_model_folder(folder)
    assert not mark.exists()


def test_a_pickle_that_hides_its_names(tmp_path: Path) -> None:
    """Names that are pushed and taken away again do not stand for those that are looked up."""
    code = b"\x80\x04\x8c\x05posix\x8c\x06system\x8c\x0bcollections0\x8c\x0bOrderedDict0\x93."
    assert callable(pickle.loads(code))  # it is os.system
    header = pickle.dumps(1, 2) * 3
    (tmp_path / "pytorch_model.bin").write_bytes(header + code)
    assert find_foreign_code(tmp_path / "pytorch_model.bin") != []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(safe_folder: Path, value: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[NORM][3:5] = value

    replace_weights(safe_folder, spoil)
    assert find_codes(safe_folder) == []
    assert find_codes(safe_folder, is_deep=True) == ["not-finite"]
    report = inspect_folder(safe_folder, is_deep=True)
    assert f"{NORM} in model.safetensors has 2 values of 32 that are not finite" in tell(report)


def test_a_damaged_page_of_an_archive(folder: Path) -> None:
    """C4: it loads, and answers other words; the check sums in the archive tell it."""
    tensor = torch.load(folder / SECOND, weights_only=True).popitem()[1]
    content, number = (folder / SECOND).read_bytes(), tensor.numpy().tobytes()
    place = content.index(number) + len(number) - 3
    (folder / SECOND).write_bytes(content[:place] + b"\x3f" + content[place + 1 :])
    assert find_codes(folder) == []
    assert find_codes(folder, is_deep=True) == ["damaged"]
    told = tell(inspect_folder(folder, is_deep=True))
    assert f"{SECOND} is damaged in " in told and "/data/" in told


def test_an_archive_without_check_sums_is_not_called_damaged(folder: Path) -> None:
    weights = torch.load(folder / SECOND, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, folder / SECOND)
    finally:
        torch.serialization.set_crc32_options(True)
    assert find_codes(folder, is_deep=True) == []


def test_sums_are_compared_deeply_and_their_files_always(folder: Path) -> None:
    """C4: SHA256SUMS was written and never read."""
    write_sums(folder, {f.name: hash_file(f) for f in folder.iterdir() if f.is_file()})
    assert find_codes(folder, is_deep=True) == []
    (folder / "chat_template.jinja").write_text("changed")
    assert find_codes(folder) == []
    assert find_codes(folder, is_deep=True) == ["sums"]
    assert "chat_template.jinja damaged or changed" in tell(inspect_folder(folder, is_deep=True))
    (folder / "chat_template.jinja").unlink()
    assert "sums" in find_odd_codes(folder)
    assert "names chat_template.jinja, which is not there" in tell(inspect_folder(folder))


def test_links(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.bin"
    (folder / SECOND).rename(elsewhere)
    (folder / SECOND).symlink_to(elsewhere)
    assert (find_codes(folder), find_odd_codes(folder)) == ([], {"link-outside"})
    elsewhere.unlink()
    assert find_codes(folder) == ["dangling-link"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a Unix")
def test_no_pipe_is_waited_for(folder: Path) -> None:
    (folder / SECOND).unlink()
    os.mkfifo(folder / SECOND)
    os.mkfifo(folder / "another")
    assert find_codes(folder) == ["missing-shard"]


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the file: the user of the tests may read everything."""
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != SECOND and real(path, mode)
    )
    assert find_codes(folder) == ["unreadable"]


def test_nothing_is_read_into_memory(safe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are looked at with --deep alone, and then block by block."""
    from chatglm.checkpoints.reading import StoredTensor

    seen: list[str] = []
    real = StoredTensor.iter_blocks

    def watch(self: StoredTensor) -> Any:
        seen.append(self.name)
        return real(self)

    monkeypatch.setattr(StoredTensor, "iter_blocks", watch)
    monkeypatch.setattr(StoredTensor, "read", None)
    inspect_folder(safe_folder)
    assert seen == []
    inspect_folder(safe_folder, is_deep=True)
    assert seen == list(stored(safe_folder))


def test_index_and_shards_that_differ(folder: Path) -> None:
    weight_map = read_json(folder / INDEX)["weight_map"]
    first, *_ = weight_map
    change_index(folder, weight_map={**weight_map, first: SECOND, "ghost": FIRST})
    told = tell(inspect_folder(folder))
    assert f"puts elsewhere than they are 1 tensors, {first} for one" in told
    assert "names, and no shard holds, 1 tensors, ghost for one" in told
    assert find_codes(folder) == []


def test_the_last_shards_are_of_another_model(folder: Path, tiny_repo: Path) -> None:
    """A mixture of two downloads: plain and packed shards."""
    weights = torch.load(folder / SECOND, weights_only=True)
    packed = {n: t.to(torch.int8) if t.dim() == 2 else t for n, t in weights.items()}
    torch.save(packed, folder / SECOND)
    assert find_codes(folder) == ["tensors"]
    assert "is stored as torch.int8, and the configuration names no such format" in tell(
        inspect_folder(folder)
    )


def test_json_is_one_line_of_ascii(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from chatglm import cli

    moved = folder.rename(folder.parent / "模型 with spaces\nand lines")
    assert cli.main(["check", str(moved), "--json", "--deep"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and out.count("\n") == 1 and json.loads(out)["folder"] == str(moved)


def test_save_file_is_of_the_same_form(safe_folder: Path) -> None:
    """Tensors of a safetensors file that another shard of an index repeats."""
    weights = stored(safe_folder)
    (safe_folder / "model.safetensors").unlink()
    save_file(weights, safe_folder / "a.safetensors", metadata={"format": "pt"})
    save_file({NORM: weights[NORM]}, safe_folder / "b.safetensors", metadata={"format": "pt"})
    weight_map = {**dict.fromkeys(weights, "a.safetensors"), NORM: "b.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (safe_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_codes(safe_folder) == ["tensor-twice"]
