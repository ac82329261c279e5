"""`chatglm adopt --out`: a folder beside the old one, with linked, packed or merged weights."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, import_from_package, load_as_told
from faults import Counter, counting, fill_disk, run_and_kill
from model_folders import change_json, hashes, make_adapter, old_name, read_json, stored
from old_folders import (
    FIRST,
    LATE,
    SMALL_KINDS,
    make_chatting,
    make_small,
    needs_shared,
    snapshot,
)
from test_adopt_folders import load_by_hub, load_by_package, logits, tokenizers

cli = import_from_package("chatglm.cli")


def adopt(folder: Path, new: Path, *words: str) -> None:
    assert cli.main(["adopt", str(folder), "--out", str(new), *words]) == 0


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_every_kind(tmp_path: Path, kind: str) -> None:
    """It is what adopting in place makes, and the old folder is as it was."""
    folder, new = SMALL_KINDS[kind](tmp_path / "old"), tmp_path / "new"
    before = snapshot(folder)
    adopt(folder, new)
    assert snapshot(folder) == before
    assert torch.equal(logits(load_by_hub(new)), logits(load_by_package(folder)))
    ours, theirs = tokenizers(new)
    assert ours("你好").input_ids == theirs("你好").input_ids
    assert cli.main(["adopt", str(folder)]) == 0
    in_place, beside = hashes_of_files(folder), hashes_of_files(new)
    assert beside.pop("SHA256SUMS")
    for name in ("README.md", "quantization_kernels.c"):  # the folder's name is in the card
        in_place.pop(name, None), beside.pop(name, None)
    assert beside == in_place
    assert cli.main(["adopt", str(new)]) == 0


def hashes_of_files(folder: Path) -> dict[str, str]:
    found = snapshot(folder)
    return {name: found[name][0] for name in found if not name.startswith("original/")}


def test_weights_are_the_same_files_and_settings_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, new = make_small(tmp_path / "old"), tmp_path / "deep" / "new"
    (folder / "notes.txt").write_text("mine\n")
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    (folder / "pytorch_model-00001.bin").chmod(0o444)
    capsys.readouterr()
    adopt(folder, new, "--dry-run")
    planned = capsys.readouterr().out.splitlines()
    assert not new.parent.exists() and planned[-1].endswith("nothing was changed (--dry-run)")
    adopt(folder, new)
    done = capsys.readouterr().out.splitlines()
    assert done[:-1] == planned[:-1]
    assert done[-1] == f"{new}: adopted from {folder}, which is as it was"
    assert "leave    notes.txt  (no part of the model)" in done
    told = {line.split()[1]: line.split()[0] for line in done[:-1]}
    assert told.keys() - {"notes.txt"} - {
        name for name, verb in told.items() if verb == "leave"
    } == {p.name for p in new.iterdir()} - {"SHA256SUMS"}
    for path in new.iterdir():
        is_linked = path.stat().st_nlink > 1
        assert is_linked is (told.get(path.name) == "link") is (path.suffix == ".bin"), path
    (folder / "pytorch_model-00001.bin").chmod(0o644)
    assert {path.name: path.stat().st_mode for path in folder.iterdir()} == modes | {
        "notes.txt": (folder / "notes.txt").stat().st_mode
    }
    change_json(new / "config.json", mine=1)
    assert "mine" not in read_json(folder / "config.json")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.ENOTSUP])
def test_another_disk_gets_copies_and_a_line(
    tmp_path: Path,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, "no link")

    folder, new = make_small(tmp_path / "old"), tmp_path / "new"
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", refuse)
        adopt(folder, new)
    name = "pytorch_model-00002.bin"
    assert f"copy     {name}  (no links from there to here)\n" in capsys.readouterr().out
    assert (new / name).stat().st_nlink == 1
    assert (new / name).read_bytes() == (folder / name).read_bytes()


def test_a_disk_without_room_for_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatglm.adopting import copying

    folder = make_small(tmp_path / "old")
    usage = type("Usage", (), {"free": 1_600_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    planned = copying.plan_copy(folder)
    monkeypatch.setattr(copying, "_has_links", lambda *args: False)
    with pytest.raises(ValueError, match=r"has 2 MB free, and the result needs .* MB: make room"):
        copying.write_copy(folder, tmp_path / "new", planned)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_kill_at_any_step_is_gone_on_from(tmp_path: Path) -> None:
    """The new folder is not there, or is whole; the old one is never touched."""
    from chatglm.adopting import copying

    folder = make_small(tmp_path / "old")
    before = snapshot(folder)
    planned = copying.plan_copy(folder)
    copying.write_copy(folder, tmp_path / "whole", planned)
    expected = hashes(tmp_path / "whole")
    step = 0
    while True:
        new = tmp_path / f"new-{step}"
        was_killed = run_and_kill(lambda n=new: copying.write_copy(folder, n, planned), step)
        assert snapshot(folder) == before
        if new.exists() and was_killed:
            left = hashes(new)  # the record of the work may be left, of a kill at the very end
            left.pop("job.json", None)
            assert left == expected
        else:
            if was_killed:
                copying.write_copy(folder, new, planned)
            assert hashes(new) == expected
            assert not new.with_name(f"{new.name}.part").exists()
        shutil.rmtree(new)
        if not was_killed:
            break
        step += 13  # all of them are a minute
    assert step > 100


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    from chatglm.adopting import copying

    folder = make_small(tmp_path / "old")
    before, planned = snapshot(folder), copying.plan_copy(folder)
    failures = 0
    for step in range(0, 200, 7):
        new = tmp_path / f"new-{step}"
        try:
            with counting(Counter(step, fill_disk), ("mkdir", "fsync", "link")):
                copying.write_copy(folder, new, planned)
        except OSError as error:
            failures += 1
            assert "No space" in str(error) and not new.exists()
            part = new.with_name(f"{new.name}.part")
            if part.exists():
                assert not list(part.glob("*.part"))
                copying.write_copy(folder, new, planned)
        assert snapshot(folder) == before
    assert failures > 10


# New weights, by the walk of quantize and merge


@pytest.mark.parametrize("bits", [4, 8])
def test_bits(tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]) -> None:
    folder, new = make_small(tmp_path / "old"), tmp_path / "new"
    before = snapshot(folder)
    words = ["--bits", str(bits)]
    capsys.readouterr()
    adopt(folder, new, *words, "--dry-run")
    planned = [line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert not new.exists()
    adopt(folder, new, *words)
    assert sorted(planned) == sorted(path.name for path in new.iterdir())
    assert "chatglm adopt" in (new / "README.md").read_text()
    assert cli.main(["quantize", str(folder), str(tmp_path / "q"), *words]) == 0
    found, expected = stored(new), stored(tmp_path / "q")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert snapshot(folder) == before
    load_by_hub(new)


@old_name
@pytest.mark.parametrize("words", [[], ["--safetensors"], ["--bits", "8"]], ids=str)
def test_an_adapter(tmp_path: Path, words: list[str]) -> None:
    folder, new = make_small(tmp_path / "old"), tmp_path / "new"
    adopt(folder, tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "lora")
    lora = ["--lora", str(tmp_path / "lora")]
    adopt(folder, new, *lora, *words)
    command = ["quantize"] if "--bits" in words else ["merge"]
    more = words if "--bits" in words else []
    target = tmp_path / "expected"
    assert cli.main([*command, str(folder), str(target), *lora, *more]) == 0
    found, expected = stored(new), stored(target)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    load_by_hub(new)


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor as it was, under one of its names; and the card's own words load it."""
    folder, new = make_small(tmp_path / "old"), tmp_path / "new"
    adopt(folder, new, "--safetensors")
    assert [path.suffix for path in new.glob("*model*") if path.suffix != ".py"][:1]
    assert not list(new.glob("*.bin"))
    weights = stored(new)
    for file in folder.glob("*.bin"):
        for name, tensor in torch.load(file, weights_only=True).items():
            if name in weights:
                assert torch.equal(weights[name], tensor)
                assert weights[name].dtype == tensor.dtype
    assert torch.equal(logits(load_by_hub(new)), logits(load_by_package(folder)))
    assert load_as_told(new, monkeypatch)["model"].config.vocab_size == 8192


@needs_shared
@pytest.mark.parametrize("vocab_size", [LATE, FIRST])
def test_both_generations(tmp_path: Path, vocab_size: int) -> None:
    folder, new = make_chatting(tmp_path / "old", vocab_size), tmp_path / "new"
    adopt(folder, new)
    assert torch.equal(logits(load_by_hub(new)), logits(load_by_package(folder)))
    assert read_json(new / "config.json")["gmask_token_id"] == vocab_size - 528 + 1
    assert (new / "quantization.py").read_bytes() == (ROOT / "quantization.py").read_bytes()
