"""What cannot be adopted is left as it was, with one line that says why and what to do."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, import_from_package
from faults import Counter, counting, fill_disk
from model_folders import change_json
from old_folders import list_folders, make_packed, make_small, snapshot, write_json

cli = import_from_package("chatglm.cli")
SHARD = "pytorch_model-00002.bin"
INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_small(tmp_path / "old")


def refused(folder: Path, *words: str) -> str:
    """Run the command, which must change nothing, and return its line."""
    place = folder if folder.is_dir() else folder.parent
    before, folders = snapshot(place), list_folders(place)
    code, out, err = run(["adopt", str(folder), *words])
    assert (code, out) == (2, "") and err.startswith("chatglm: ") and err.count("\n") == 1, err
    assert "Traceback" not in err and "Errno" not in err
    assert snapshot(place) == before and list_folders(place) == folders
    return err


def run(words: list[str]) -> tuple[int, str, str]:
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    return code, out.getvalue(), err.getvalue()


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def field(file: str = "config.json", **fields: object) -> Callable[[Path], object]:
    return lambda folder: change_json(folder / file, **fields)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (remove(SHARD), f"misses the shard {SHARD}: download it again"),
    "a Git-LFS pointer": (write(SHARD, "version https://git-lfs"), "no complete weight file"),
    "no weights": (
        lambda f: [p.unlink() for p in f.glob("pytorch_model*")],
        "has no weights: put",
    ),
    "no index, a shard missing": (
        lambda f: [
            (f / INDEX).unlink(),
            (f / SHARD).rename(f / "pytorch_model-00002-of-00003.bin"),
        ],
        "misses 2 of 3 shards (pytorch_model-00001-of-00003.bin, pytorch_model-00003",
    ),
    "no index, shards of two models": (
        lambda f: [
            (f / INDEX).unlink(),
            (f / SHARD).rename(f / "pytorch_model-00002-of-00003.bin"),
            (f / "pytorch_model-00001.bin").rename(f / "pytorch_model-00001-of-00002.bin"),
        ],
        "shards of several models and no index",
    ),
    "an index that is none": (write(INDEX, "{}"), "which leads to no shards"),
    "other weights": (field(num_layers=3), "has num_layers 3, and the weights 2"),
    "no JSON": (write("config.json", "{"), "config.json is no JSON file"),
    "no JSON object": (write("tokenizer_config.json", "[]"), "holds a list, and not fields"),
    "settings that are none": (write("generation_config.json", "1"), "holds a int, and not fields"),
    "no vocabulary of its own": (write("ice_text.model", "version https://git-lfs"), "ice_text"),
    "hashes that are none": (write("SHA256SUMS", "x\n"), "line 1 of"),
    "no configuration": (remove("config.json"), "no model folder: it has no config.json"),
    "ChatGLM2": (field(padded_vocab_size=65024), "a ChatGLM2 or ChatGLM3, and not the first"),
    "GLM-4": (field(padded_vocab_size=151552), "a GLM-4, and not the first ChatGLM-6B"),
    "a stranger": (field(model_type="gpt2", architectures=["GPT2"]), "a model of type gpt2, and"),
    "an original that is not ours": (
        lambda f: [(f / "original").mkdir(), (f / "original" / "x").write_text("")],
        "original is there and was not made by chatglm adopt",
    ),
    "a file named original": (write("original", "x"), "original is there and was not made by"),
    "a folder in the way": (lambda f: (f / "cache_chatglm.py").mkdir(), "is a folder, and a file"),
    "quantized by another tool": (
        field(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized already, by gptq: name the folder with the float weights",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_folder_that_is_not_whole_or_no_model(folder: Path, case: str) -> None:
    spoil, told = SPOILED[case]
    spoil(folder)
    assert told in refused(folder)
    assert told in refused(folder, "--dry-run")


def test_no_folder(tmp_path: Path, folder: Path) -> None:
    assert "is no folder: name a model folder" in refused(tmp_path / "away")
    told = refused(folder / "config.json")
    assert "config.json is a file: name the folder that it lies in" in told
    (tmp_path / "empty").mkdir()
    assert "is an empty folder: download a model" in refused(tmp_path / "empty")


def test_an_adapter_alone(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    write_json(
        adapter / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "b"}
    )
    assert "is a LoRA adapter of b and no model: name the model's own folder" in refused(adapter)


def test_a_snapshot_of_the_cache_is_never_written_through(folder: Path, tmp_path: Path) -> None:
    """Its files are links to shared blobs; a copy of it is made with --out."""
    repo = tmp_path / "hub" / "models--THUDM--chatglm-6b"
    place = repo / "snapshots" / "0123abcd"
    (repo / "blobs").mkdir(parents=True)
    place.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = repo / "blobs" / str(number)
        shutil.copy2(file, blob)
        (place / file.name).symlink_to(os.path.relpath(blob, place))
    blobs = snapshot(repo / "blobs")
    told = f"{place} belongs to the cache of huggingface_hub, whose files are shared: name a new "
    assert told in refused(place)
    assert told in refused(place, "--undo")
    loose = tmp_path / "loose"  # wherever the links are
    loose.mkdir()
    for link in place.iterdir():
        (loose / link.name).symlink_to(link.resolve())
    assert "belongs to the cache" in refused(loose)
    new = tmp_path / "new"
    assert run(["adopt", str(place), "--out", str(new)])[0] == 0
    assert snapshot(repo / "blobs") == blobs
    assert not any(path.is_symlink() for path in new.iterdir())


def test_links_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "mine.json")
    (folder / "config.json").symlink_to(tmp_path / "mine.json")
    told = refused(folder)
    assert "config.json is a link to" in told and "mine.json: put a copy of the file" in told


def test_a_folder_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    told = "cannot be written to: name a new folder (--out DIR), or change its rights"
    with monkeypatch.context() as patched:
        patched.setattr(
            os, "access", lambda path, mode: access(path, mode) and Path(path) != folder
        )
        assert told in refused(folder)
        assert told in refused(folder, "--undo")


def test_a_full_disk_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder is as it was; of a refusal in the middle the next run makes the end."""
    before = snapshot(folder)
    with counting(Counter(3, fill_disk), ("fsync",)):
        told = refused(folder)
    assert "could not be adopted (No space left on device): it is as it was; make room" in told
    assert run(["adopt", str(folder)])[0] == 0
    assert run(["adopt", str(folder), "--undo"])[0] == 0
    assert snapshot(folder) == before


def test_where_a_new_folder_may_not_be(folder: Path, tmp_path: Path) -> None:
    assert "is inside it: name a folder elsewhere" in refused(
        folder, "--out", str(folder / "new")
    ).replace("or inside", "is inside")
    assert f"{folder} is {folder} or inside it" in refused(folder, "--out", str(folder))
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("")
    assert f"{full} exists and is not empty: remove it" in refused(folder, "--out", str(full))
    assert "exists and is not empty" in refused(folder, "--out", str(full / "x"))


OPTIONS = {
    "bits": (["--bits", "4"], "--bits makes new weights, and those of FOLDER stay"),
    "several": (["--bits", "4", "--lora", "x", "--safetensors"], "--bits, --lora, --safetensors m"),
    "a prefix": (["--ptuning", "x"], "--ptuning makes new weights"),
    "undo": (["--undo", "--out", "x"], "--undo goes without --out: what --out made is undone by"),
    "undo bits": (["--undo", "--bits", "8"], "--undo goes without --bits"),
    "prefix and bits": (
        ["--ptuning", "x", "--bits", "4", "--out", "new"],
        "--ptuning does not go with --bits: make a folder with the prefix first",
    ),
    "no prefix folder": (["--ptuning", "/away", "--out", "new"], "/away is no folder"),
    "nothing to undo": (["--undo"], "was not adopted, or that is undone already: nothing to undo"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_go_together(folder: Path, case: str) -> None:
    words, told = OPTIONS[case]
    assert told in refused(folder, *words)


def test_packed_weights_are_not_packed_again(tmp_path: Path) -> None:
    folder = make_packed(tmp_path / "int4", 4, False)
    out = ["--out", str(tmp_path / "new")]
    assert "quantized already; name the folder with the float weights" in refused(
        folder, "--bits", "8", *out
    )
    assert "quantized already" in refused(folder, "--safetensors", *out)


def test_a_clone_s_links_to_weights_do_not_matter(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("pytorch_model-*.bin"):
        file.rename(tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    assert run(["adopt", str(folder)])[0] == 0
    assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    assert (ROOT / "modeling_chatglm.py").read_bytes() == (
        folder / "modeling_chatglm.py"
    ).read_bytes()
