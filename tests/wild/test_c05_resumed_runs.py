"""C5: what `resume` does: finished runs stay so, longer and moved ones go on, all else is told.

The damage of checkpoints is in `test_c05_damaged_checkpoints.py`.
"""

import errno
import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("chatglm", reason="needs the package")

from resumable_runs import (
    FULL,
    LORA,
    Interrupter,
    hash_results,
    run,
    run_interrupted,
    snapshot,
    words,
    write_data,
)
from safetensors import SafetensorError

from chatglm.training import checkpoints, sources
from chatglm.training.checkpoints import MANIFEST_FILE, find_fault, list_checkpoints
from chatglm.training.trainer import ChatTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
Captured = pytest.CaptureFixture[str]
KINDS = {"sft": ("sft", FULL), "lora": ("sft", LORA), "ppo": ("ppo", LORA)}
if importlib.util.find_spec("trl") is not None:
    KINDS |= {"reward": ("reward", LORA), "dpo": ("dpo", LORA)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def refusal(capsys: Captured, *command: str) -> str:
    """Return the one line of a command that is refused."""
    capsys.readouterr()
    assert run(*command) == 2
    return capsys.readouterr().err.splitlines()[-1]


def read_rates(folder: Path, step: int) -> dict[int, float]:
    """Return the learning rates of a run's steps, as its checkpoint tells."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return {e["step"]: e["learning_rate"] for e in state["log_history"] if "learning_rate" in e}


# A finished run stays finished


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_stays_finished(
    kind: str, tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    stage, keys = KINDS[kind]
    # Five steps are no whole number of epochs, behind which the library would not go on either.
    command = words(stage, tiny_repo, data, tmp_path / "out", **keys, max_steps=5)
    assert run(*command) == 0
    figures = capsys.readouterr().out.splitlines()[-1]
    before = snapshot(tmp_path / "out")
    for _ in range(2):
        assert run(*command, "--resume") == 0
        told = capsys.readouterr()
        assert told.out == figures + "\n"
        assert f"{tmp_path / 'out'} is finished with 5 steps: nothing is left to do" in told.err
        assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["lora", "ppo"])
def test_a_kill_between_the_last_checkpoint_and_the_result(
    kind: str, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    """No step is taken, and the result is that of the checkpoint."""
    stage, keys = KINDS[kind]
    more = {**keys, "max_steps": 5, "eval_data": data / "rows.jsonl"}
    command = words(stage, tiny_repo, data, tmp_path / "out", **more)
    assert run(*command) == 0
    expected = hash_results(tmp_path / "out")
    before = snapshot(tmp_path / "out" / "checkpoint-5")
    for name in (*expected, "run.json"):
        (tmp_path / "out" / name).unlink()
    assert run(*command, "--resume") == 0
    assert hash_results(tmp_path / "out") == expected
    assert snapshot(tmp_path / "out" / "checkpoint-5") == before
    assert not (tmp_path / "out" / "checkpoint-6").exists()


def test_epochs_end_where_they_did(tiny_repo: Path, data: Path, tmp_path: Path) -> None:
    """With a checkpoint and an evaluation behind every epoch, none of them twice."""
    more = {"save_strategy": "epoch", "eval_strategy": "epoch", "save_steps": None, **LORA}
    more |= {"eval_data": data / "rows.jsonl", "max_steps": 9, "num_train_epochs": None}
    command = words("sft", tiny_repo, data, tmp_path / "out", **more)
    assert run(*command) == 0
    before = snapshot(tmp_path / "out" / "checkpoint-9")
    (tmp_path / "out" / "run.json").unlink()
    assert run(*command, "--resume") == 0
    assert snapshot(tmp_path / "out" / "checkpoint-9") == before


def test_a_damaged_result_is_written_again(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    command = words("sft", tiny_repo, data, tmp_path / "out", **LORA)
    assert run(*command) == 0
    expected = hash_results(tmp_path / "out")
    for change in (lambda file: file.write_bytes(b"half"), lambda file: file.unlink()):
        change(tmp_path / "out" / "adapter_model.safetensors")
        capsys.readouterr()
        assert run(*command, "--resume") == 0
        assert "is finished, but adapter_model.safetensors is" in capsys.readouterr().err
        assert hash_results(tmp_path / "out") == expected
    # Whoever needs the room may delete the checkpoints; then only what is whole stays.
    for checkpoint in list_checkpoints(tmp_path / "out"):
        shutil.rmtree(checkpoint)
    assert run(*command, "--resume") == 0
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    line = refusal(capsys, *command, "--resume")
    assert "is finished and has no whole checkpoint any more to go on from" in line
    line = refusal(capsys, *command, "--resume", "--num_train_epochs", "2")
    assert "is finished and has no whole checkpoint any more to go on from" in line


# A longer run


@pytest.mark.parametrize("kind", KINDS)
def test_more_epochs(
    kind: str, tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    """One epoch and one more, with a rate that does not fall, are the two epochs of one run."""
    stage, keys = KINDS[kind]
    keys = {**keys, "lr_scheduler_type": "constant"}
    short = words(stage, tiny_repo, data, tmp_path / "out", **keys)
    longer = words(stage, tiny_repo, data, tmp_path / "out", **{**keys, "num_train_epochs": 2})
    assert run(*short) == 0
    capsys.readouterr()
    assert run(*longer, "--resume") == 0
    errors = capsys.readouterr().err
    assert "the whole run is 12 steps now and was to be 6: the learning rate goes on" in errors
    assert "num_train_epochs: 2" in (tmp_path / "out" / "settings.yaml").read_text()
    straight = words(stage, tiny_repo, data, tmp_path / "one", **{**keys, "num_train_epochs": 2})
    assert run(*straight) == 0
    assert hash_results(tmp_path / "out") == hash_results(tmp_path / "one")
    assert run(*longer, "--resume") == 0  # and is finished now
    assert "is finished with 12 steps" in capsys.readouterr().err
    line = refusal(capsys, *short, "--resume")
    assert "num_train_epochs=1 is less than what" in line and "12 steps" in line


def test_the_rates_of_a_longer_run_are_those_of_its_own_schedule(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    """From its first step on: the end of the short schedule is 0, and nothing would be learned."""
    keys = {**LORA, "lr_scheduler_type": "linear"}
    for output, lengths in (("out", (4, 6)), ("one", (6,))):
        for number, length in enumerate(lengths):
            more = {**keys, "max_steps": length, "resume": bool(number)}
            assert run(*words("sft", tiny_repo, data, tmp_path / output, **more)) == 0
    assert "(0.001 after step 4, and 0 in one of 4)" in capsys.readouterr().err
    mended, straight = (read_rates(tmp_path / name, 6) for name in ("out", "one"))
    assert [mended[step] for step in (5, 6)] == [straight[step] for step in (5, 6)] != [0, 0]


def test_a_shorter_run_is_refused(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    for stage in ("sft", "ppo"):
        folder = tmp_path / stage
        command = words(stage, tiny_repo, data, folder, **LORA)
        assert run_interrupted(5, *command) == 130
        line = refusal(capsys, *command, "--resume", "--max_steps", "3")
        assert f"max_steps=3 is less than what is done: {folder / 'checkpoint-4'} is the" in line
        line = refusal(capsys, *command, "--resume", "--num_train_epochs", "0.5")
        assert "has done 4 steps, and the whole run is to be 3 now: set max_steps or" in line
        # As many as are done are no step more.
        assert run(*command, "--resume", "--max_steps", "4") == 0
        assert [path.name for path in list_checkpoints(folder)][-1] == "checkpoint-4"
        line = refusal(capsys, *command, "--resume", "--max_steps", "3")
        assert "max_steps=3 is less than what" in line


# What moved


def test_a_moved_run_goes_on(
    tiny_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Output, data, model and reward function, some of them by relative paths now."""
    for stage in ("sft", "ppo"):
        place = tmp_path / stage
        data = write_data(place / "data")
        repo = shutil.copytree(tiny_repo, place / "model")
        assert run(*words(stage, repo, data, place / "whole", **LORA)) == 0
        assert run_interrupted(5, *words(stage, repo, data, place / "cut", **LORA)) == 130
        place.rename(tmp_path / "moved")
        monkeypatch.chdir(tmp_path / "moved")
        there = words(stage, Path("model"), Path("data"), Path("cut"), **LORA)
        capsys.readouterr()
        assert run(*there, "--resume") == 0
        assert "goes on from cut/checkpoint-4" in capsys.readouterr().err
        assert hash_results(Path("cut")) == hash_results(Path("whole"))
        fields = json.loads(Path("cut/adapter_config.json").read_text())
        assert Path(fields["base_model_name_or_path"]) == Path.cwd() / "model"
        assert run(*there, "--resume") == 0
        monkeypatch.chdir(tmp_path)
        (tmp_path / "moved").rename(tmp_path / f"{stage}-moved")


def test_what_is_not_the_same_is_refused(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    command = words("sft", tiny_repo, data, tmp_path / "out", **LORA)
    assert run_interrupted(5, *command) == 130
    rows = data / "rows.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("it is 3.", "it is 4."))
    line = refusal(capsys, *command, "--resume")
    assert "train_data" in line and "holds something else than when" in line
    renamed = rows.rename(data / "others.jsonl")
    line = refusal(capsys, *command, "--train_data", str(renamed), "--resume")
    assert "train_data" in line and "holds something else than when" in line
    renamed.write_text(text)  # the same rows under another name
    assert run(*command, "--train_data", str(renamed), "--resume") == 0
    other = shutil.copytree(tiny_repo, tmp_path / "other")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    there = [*command, "--train_data", str(renamed), "--resume"]
    line = refusal(capsys, *there, "--model", str(other))
    assert line.startswith("chatglm: model (") and "holds something else" in line
    line = refusal(capsys, *there, "--lora_rank", "3")
    assert "lora_rank was 2" in line


def test_another_stage_is_refused(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run_interrupted(3, *words("sft", tiny_repo, data, tmp_path / "out", **LORA)) == 130
    line = refusal(capsys, *words("ppo", tiny_repo, data, tmp_path / "out", **LORA, resume=True))
    assert "was begun by chatglm train sft, and ppo cannot go on with it" in line
    assert run_interrupted(3, *words("ppo", tiny_repo, data, tmp_path / "two", **LORA)) == 130
    state = tmp_path / "two" / "checkpoint-2" / "trainer_state.json"
    state.write_text('{"global_step": 2}')
    line = refusal(capsys, *words("ppo", tiny_repo, data, tmp_path / "two", **LORA, resume=True))
    assert f"{state} is none that PPO has written" in line


def test_a_kill_at_the_very_beginning_leaves_an_empty_folder(
    tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for name in ("settings.yaml.part", "settings.yaml", "run.json.part"):
        (tmp_path / "out" / name).write_text("")
    assert run(*words("sft", tiny_repo, data, tmp_path / "out", **LORA, max_steps=1)) == 0
    assert not list((tmp_path / "out").glob("*.part"))


def test_large_files_are_known_by_blocks_from_everywhere(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 4)
    monkeypatch.setattr(sources, "NUM_BLOCKS", 5)
    file = tmp_path / "large"
    file.write_bytes(bytes(100))
    before = sources.mark_file(file)
    for place in (0, 3, 24, 48, 72, 99):
        content = bytearray(100)
        content[place] = 1
        file.write_bytes(content)
        assert sources.mark_file(file) != before
    file.write_bytes(bytes(101))
    assert sources.mark_file(file) != before


def test_the_best_checkpoint_moves_along(
    tiny_repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """The best is that of step 2 by a figure that only falls, and is loaded at the end."""
    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0] * 3)
    evaluate = ChatTrainer.evaluate

    def pretend(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluate(self, *args, **kwargs) | {"eval_token_loss": next(losses)}

    monkeypatch.setattr(ChatTrainer, "evaluate", pretend)
    keys = {**LORA, "eval_data": data / "rows.jsonl", "eval_steps": 2, "save_total_limit": 1}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "token_loss"}
    keys |= {"greater_is_better": False}
    command = words("sft", tiny_repo, data, tmp_path / "out", **keys)
    assert run_interrupted(5, *command) == 130
    left = [path.name for path in list_checkpoints(tmp_path / "out")]
    assert left == ["checkpoint-2", "checkpoint-4"]  # the best, and the newest
    shutil.copytree(tmp_path / "out", tmp_path / "without")
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = words("sft", tiny_repo, data, tmp_path / "moved", **keys)
    assert run(*moved, "--resume") == 0
    best = tmp_path / "moved" / "checkpoint-2"
    name = "adapter_model.safetensors"
    assert hash_results(tmp_path / "moved")[name] == hash_results(best)[name]
    state = json.loads((tmp_path / "moved" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    shutil.rmtree(tmp_path / "without" / "checkpoint-2")
    capsys.readouterr()
    without = words("sft", tiny_repo, data, tmp_path / "without", **keys)
    assert run(*without, "--resume") == 0
    assert "checkpoint-2, the best so far, is not there any more" in capsys.readouterr().err
    last = tmp_path / "without" / "checkpoint-6"
    assert hash_results(tmp_path / "without")[name] == hash_results(last)[name]


# Other ends, other processes, other versions


def test_an_empty_folder_begins(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "out").mkdir()
    command = words("sft", tiny_repo, data, tmp_path / "out", **LORA, max_steps=1, resume=True)
    assert run(*command) == 0
    assert f"{tmp_path / 'out'} holds no run to go on with: it begins" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_an_interrupted_run_says_how_it_goes_on(
    kind: str, tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    stage, keys = KINDS[kind]
    command = words(stage, tiny_repo, data, tmp_path / "out", **keys)
    assert run_interrupted(1, *command) == 130
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "interrupted; the same command with --resume goes on from the beginning" in line
    assert run_interrupted(5, *command, "--resume") == 130
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.endswith(f"--resume goes on from {tmp_path / 'out' / 'checkpoint-4'}")
    assert not (tmp_path / "out" / ".chatglm.lock").exists()


def test_a_run_that_is_told_to_end_says_so_too(
    tiny_repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminate(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Interrupter, "on_step_end", terminate)
    command = words("sft", tiny_repo, data, tmp_path / "out", **LORA)
    with pytest.raises(SystemExit) as ended:
        run_interrupted(3, *command)
    assert ended.value.code == 143
    assert f"goes on from {tmp_path / 'out' / 'checkpoint-2'}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "out" / ".chatglm.lock").exists()


def test_steps_that_are_taken_again_leave_one_answer(
    tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    more = {**LORA, "sample_prompts": "1 plus 1?", "sample_steps": 1}
    command = words("sft", tiny_repo, data, tmp_path / "out", **more)
    assert run_interrupted(4, *command) == 130
    assert run(*command, "--resume") == 0
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
]


@pytest.mark.parametrize("error", FULL_DISK, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["lora", "ppo"])
def test_a_full_disk_is_told_and_leaves_the_last_good_one(
    kind: str,
    error: Exception,
    tiny_repo: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    stage, keys = KINDS[kind]
    save = torch.save

    def save_half(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(content, file, *args, **kwargs)
        if "checkpoint-4" in str(file) and "optimizer" in str(file):
            os.truncate(file, 100)
            raise error

    folder = tmp_path / "out"
    command = words(stage, tiny_repo, data, folder, **keys)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        line = refusal(capsys, *command)
    assert line.startswith(f"chatglm: the disk took no more of what was written to {folder} (")
    assert f"{folder / 'checkpoint-2'} is the last good checkpoint. Make room" in line
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-2"]
    assert run(*command, "--resume") == 0
    assert run(*words(stage, tiny_repo, data, tmp_path / "whole", **keys)) == 0
    assert hash_results(folder) == hash_results(tmp_path / "whole")


def test_another_error_is_no_full_disk(tmp_path: Path) -> None:
    for error in (RuntimeError("mat1 and mat2"), FileNotFoundError(errno.ENOENT, "no such file")):
        with pytest.raises(type(error)), checkpoints.telling_full_disk(tmp_path):
            raise error


def test_another_number_of_processes_is_refused(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    command = words("sft", tiny_repo, data, tmp_path / "out", **LORA)
    assert run_interrupted(5, *command) == 130
    newest = tmp_path / "out" / "checkpoint-4"
    for number in range(2):
        shutil.copy(newest / "rng_state.pth", newest / f"rng_state_{number}.pth")
    (newest / "rng_state.pth").unlink()
    (newest / MANIFEST_FILE).unlink()
    checkpoints.seal(newest)
    line = refusal(capsys, *command, "--resume")
    assert "was written by 2 processes and 1 are running now, which would be other batches" in line
    assert find_fault(newest) is None
    line = refusal(capsys, *command, "--resume", "--per_device_train_batch_size", "1")
    assert "per_device_train_batch_size was 2" in line


def test_other_versions_are_told(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    command = words("sft", tiny_repo, data, tmp_path / "out", **LORA)
    assert run_interrupted(5, *command) == 130
    manifest = tmp_path / "out" / "checkpoint-4" / MANIFEST_FILE
    content = json.loads(manifest.read_text())
    content["versions"]["transformers"] = "4.1.0"
    manifest.write_text(json.dumps(content))
    capsys.readouterr()
    assert run(*command, "--resume") == 0
    errors = capsys.readouterr().err
    assert "checkpoint-4, which was written with transformers 4.1.0, now " in errors


def test_without_an_optimizer_no_run_goes_on(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    """Rotation counts such checkpoints as any others."""
    more = {**LORA, "save_only_model": True, "save_total_limit": 1}
    command = words("sft", tiny_repo, data, tmp_path / "out", **more)
    assert run_interrupted(5, *command) == 130
    before = snapshot(tmp_path / "out" / "checkpoint-4")
    line = refusal(capsys, *command, "--resume")
    assert "save_only_model leaves the optimizer out of checkpoints" in line
    assert snapshot(tmp_path / "out" / "checkpoint-4") == before
    assert len(list_checkpoints(tmp_path / "out")) == 1


def test_a_run_of_an_older_version_goes_on(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    """It has no marks, manifests and newer keys; files are then compared by their names."""
    command = words("sft", tiny_repo, data, tmp_path / "out", **LORA)
    assert run_interrupted(5, *command) == 130
    (tmp_path / "out" / "run.json").unlink()
    for checkpoint in list_checkpoints(tmp_path / "out"):
        (checkpoint / MANIFEST_FILE).unlink()
    line = refusal(capsys, *command, "--train_data", str(data / "pairs.jsonl"), "--resume")
    assert "train_data was" in line
    (tmp_path / "out" / "run.json").write_text("{")
    settings = tmp_path / "out" / "settings.yaml"
    assert "adapter: []\n" in settings.read_text()
    older = settings.read_text().replace("adapter: []\n", "adapter: ''\n").splitlines(keepends=True)
    newer = ("learn_turns", "val_ratio", "any_base", "use_dora", "early_stopping_patience")
    settings.write_text("".join(line for line in older if not line.startswith(newer)))
    assert run(*command, "--resume") == 0
    assert "run.json cannot be read" in capsys.readouterr().err
    assert run(*words("sft", tiny_repo, data, tmp_path / "whole", **LORA)) == 0
    assert hash_results(tmp_path / "out") == hash_results(tmp_path / "whole")
