"""C5: a damaged checkpoint is passed over, by name; rotation never costs the last good one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("chatglm", reason="needs the package")

from faults import run_and_kill
from resumable_runs import (
    FULL,
    LORA,
    hash_results,
    run,
    run_interrupted,
    words,
    write_data,
)

from chatglm.training import checkpoints
from chatglm.training.checkpoints import (
    MANIFEST_FILE,
    find_checkpoint,
    find_fault,
    list_checkpoints,
    rotate,
    seal,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
KINDS = {"full": ("sft", FULL), "lora": ("sft", LORA), "ppo": ("ppo", LORA)}
Runs = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(tiny_repo: Path, data: Path) -> Runs:
    """Of each kind a run that was interrupted in its sixth step, and one that was not."""
    found = {}
    for name, (stage, keys) in KINDS.items():
        whole, cut = data / f"{name}-whole", data / f"{name}-cut"
        assert run(*words(stage, tiny_repo, data, whole, **keys)) == 0
        assert run_interrupted(6, *words(stage, tiny_repo, data, cut, **keys)) == 130
        assert [path.name for path in list_checkpoints(cut)] == ["checkpoint-2", "checkpoint-4"]
        found[name] = (whole, cut)
    return found


Damage = Callable[[Path], object]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path) -> None:
    """Change one bit in the middle of a file, which stays as long and can be opened."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


DAMAGES: list[Damage] = [cut, empty, zero, flip, remove]
FILES = {
    "lora": ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"],
    "full": ["model.safetensors", "config.json"],
    "ppo": ["optimizer.pt", "value_head.safetensors", "adapter_model.safetensors"],
}
CASES = [(kind, file, damage) for kind in FILES for file in FILES[kind] for damage in DAMAGES]
CASES += [
    (kind, "trainer_state.json", damage) for kind in FILES for damage in (cut, empty, zero, remove)
]
CASES += [("lora", MANIFEST_FILE, damage) for damage in (cut, empty, zero)]


@pytest.mark.parametrize(("kind", "name", "damage"), CASES)
def test_every_damage_is_named_and_passed_over(
    kind: str, name: str, damage: Damage, runs: Runs, tmp_path: Path
) -> None:
    folder = shutil.copytree(runs[kind][1], tmp_path / "out")
    damage(folder / "checkpoint-4" / name)
    said: list[str] = []
    assert find_checkpoint(folder, said.append) == folder / "checkpoint-2"
    (line,) = said
    assert f"{folder / 'checkpoint-4'} is passed over: {name}" in line
    assert (folder / "broken-checkpoint-4").is_dir() and "broken-checkpoint-4" in line


# Those of other tools and older versions have no manifest: of a bit that flipped only the sums of
# an archive tell, which are of what it holds and not of what is between.
UNSEALED = [case for case in CASES if case[1] != MANIFEST_FILE]
UNSEALED = [c for c in UNSEALED if c[2] is not flip or c[1] == "optimizer.pt"]
UNSEALED = [c for c in UNSEALED if not (c[1] == "config.json" and c[2] is remove)]


@pytest.mark.parametrize(("kind", "name", "damage"), UNSEALED)
def test_damage_is_found_without_a_manifest(
    kind: str, name: str, damage: Damage, runs: Runs, tmp_path: Path
) -> None:
    folder = shutil.copytree(runs[kind][1], tmp_path / "out")
    for checkpoint in list_checkpoints(folder):
        (checkpoint / MANIFEST_FILE).unlink()
        assert find_fault(checkpoint) is None
    damage(folder / "checkpoint-4" / name)
    said: list[str] = []
    assert find_checkpoint(folder, said.append) == folder / "checkpoint-2"
    assert name.partition(".")[0] in said[0] and len(said) == 1
    assert (folder / "checkpoint-2" / MANIFEST_FILE).is_file()  # from now on sizes tell


def test_what_people_change_is_no_damage(runs: Runs, tmp_path: Path) -> None:
    folder = shutil.copytree(runs["lora"][1], tmp_path / "out")
    config = folder / "checkpoint-4" / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": "elsewhere"}
    config.write_text(json.dumps(fields))
    (folder / "checkpoint-4" / "README.md").write_text("mine")
    assert find_fault(folder / "checkpoint-4") is None
    cut(config)
    fault = find_fault(folder / "checkpoint-4")
    assert fault is not None and fault.startswith("adapter_config.json (")


def test_a_missing_shard_is_named(runs: Runs, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(runs["full"][1] / "checkpoint-4", tmp_path / "checkpoint-4")
    (checkpoint / MANIFEST_FILE).unlink()
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    fault = find_fault(checkpoint)
    assert fault is not None and fault.startswith("model-00002-of-00002.safetensors is missing")


def test_a_checkpoint_of_one_process_of_several_is_half(runs: Runs, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(runs["lora"][1] / "checkpoint-4", tmp_path / "checkpoint-4")
    (checkpoint / MANIFEST_FILE).unlink()
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert find_fault(checkpoint) == "rng_state_1.pth is missing"
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert find_fault(checkpoint) is None
    assert checkpoints.count_processes(checkpoint) == 2


def test_files_that_nobody_may_write_to_are_sealed(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 1, is_sealed=False)
    (checkpoint / "weights.bin").chmod(0o444)
    seal(checkpoint)
    assert find_fault(checkpoint) is None


def test_an_empty_folder_is_no_checkpoint(runs: Runs, tmp_path: Path) -> None:
    folder = shutil.copytree(runs["lora"][1], tmp_path / "out")
    (folder / "checkpoint-9").mkdir()
    said: list[str] = []
    assert find_checkpoint(folder, said.append) == folder / "checkpoint-4"
    assert "checkpoint-9 is passed over: it is empty" in said[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_the_older_one_to_the_same_bits(
    kind: str,
    runs: Runs,
    tiny_repo: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, cut_off = runs[kind]
    folder = shutil.copytree(cut_off, tmp_path / "out")
    cut(folder / "checkpoint-4" / "optimizer.pt")
    stage, keys = KINDS[kind]
    assert run(*words(stage, tiny_repo, data, folder, **keys, resume=True)) == 0
    errors = capsys.readouterr().err
    assert "checkpoint-4 is passed over: optimizer.pt has" in errors
    assert f"goes on from {folder / 'checkpoint-2'}" in errors
    assert hash_results(folder) == hash_results(whole)
    assert (folder / "broken-checkpoint-4" / "optimizer.pt").is_file()  # kept, to be looked at
    # What is damaged a second time gets another name beside it.
    cut(folder / "checkpoint-4" / "optimizer.pt")
    checkpoints.set_aside(folder / "checkpoint-4")
    assert (folder / "broken-checkpoint-4-2").is_dir()


def test_without_a_whole_one_the_run_begins_again(
    runs: Runs, tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut_off = runs["lora"]
    folder = shutil.copytree(cut_off, tmp_path / "out")
    for checkpoint in list_checkpoints(folder):
        empty(checkpoint / "rng_state.pth")
    assert run(*words("sft", tiny_repo, data, folder, **LORA, resume=True)) == 0
    errors = capsys.readouterr().err
    assert f"{folder} has no whole checkpoint: the run begins again with its first step" in errors
    assert "checkpoint-2 is passed over" in errors and "checkpoint-4 is passed over" in errors
    assert hash_results(folder) == hash_results(whole)


# Rotation


def make_checkpoint(folder: Path, step: int, is_sealed: bool = True) -> Path:
    """Write a small checkpoint, whole but for its manifest."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.bin").write_bytes(b"1234" * step)
    if is_sealed:
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        seal(checkpoint)
    return checkpoint


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path, step) for step in (9, 10, 11, 100)]
    rotate(tmp_path, 2, [Path("elsewhere") / "checkpoint-9"])
    assert list_checkpoints(tmp_path) == [made[0], made[3]]
    rotate(tmp_path, 1)
    assert list_checkpoints(tmp_path) == [made[3]]
    rotate(tmp_path, 1)
    rotate(tmp_path, None)
    rotate(tmp_path, 0)
    assert list_checkpoints(tmp_path) == [made[3]]


def test_ruins_do_not_count(tmp_path: Path) -> None:
    """Two whole ones are kept though there are more folders of that name."""
    whole = [make_checkpoint(tmp_path, step) for step in (1, 2)]
    cut(make_checkpoint(tmp_path, 3) / "weights.bin")
    make_checkpoint(tmp_path, 4, is_sealed=False)
    (tmp_path / "checkpoint-5").mkdir()
    said: list[str] = []
    rotate(tmp_path, 2, tell=said.append)
    assert list_checkpoints(tmp_path) == whole
    assert len(said) == 3 and "weights.bin has 6 bytes of 12" in said[0]
    # What never was complete is of no use to anybody once there is a newer one.
    assert [path.name for path in tmp_path.glob("broken-*")] == ["broken-checkpoint-3"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_while_one_is_deleted_costs_no_good_one(tmp_path: Path) -> None:
    """At every single operation of a rotation: the newest is whole, and the next one clears up."""
    killed = number = 0
    while True:
        folder = tmp_path / str(number)
        for step in (1, 2, 3, 4):
            make_checkpoint(folder, step)
        is_killed = run_and_kill(lambda f=folder: rotate(f, 2), number)
        assert find_fault(folder / "checkpoint-4") is None
        assert find_fault(folder / "checkpoint-3") is None
        said: list[str] = []
        rotate(folder, 2, tell=said.append)
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-4"]
        assert not said  # a half-deleted one is none, so there is nothing to pass over
        if not is_killed:
            break
        killed, number = killed + 1, number + 1
    assert killed >= 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_while_one_is_sealed_costs_nothing(runs: Runs, tmp_path: Path) -> None:
    """All of it was written, which its content shows."""
    number = 0
    while True:
        folder = shutil.copytree(runs["lora"][1], tmp_path / str(number))
        (folder / "checkpoint-4" / MANIFEST_FILE).unlink()
        is_killed = run_and_kill(lambda place=folder: seal(place / "checkpoint-4"), number)
        assert find_checkpoint(folder, lambda line: None) == folder / "checkpoint-4"
        assert find_fault(folder / "checkpoint-4") is None  # it has been sealed meanwhile
        assert not list(folder.rglob("*.part"))
        if not is_killed:
            break
        number += 1
    assert number >= 5
