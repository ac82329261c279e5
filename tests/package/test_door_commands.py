"""The commands go through the package door: no Python of a folder runs unless it is trusted."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from model_folders import hashes, read_json, stored

from chatglm import cli
from chatglm.checkpoints.checksums import write_sums
from chatglm.training.command import name_folder

DEAD = 'raise ImportError("the folder\'s code ran")\n'
ROWS = [{"prompt": f"{n} plus 1?", "response": f"It is {n + 1}."} for n in range(4)]
TRAIN = "--max_steps 1 --per_device_train_batch_size 4 --disable_tqdm True --lora_rank 2"
old_names = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture
def dead(tiny_repo: Path, tmp_path: Path) -> Path:
    """A whole model folder whose Python files, of any age, cannot be imported."""
    folder = Path(shutil.copytree(tiny_repo, tmp_path / "dead"))
    for file in folder.glob("*.py"):
        file.write_text(DEAD)
    return folder


def chat(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    return cli.main(["chat", *words, "--max-new-tokens", "2"])


@pytest.mark.parametrize("name", [[], ["--model"]], ids=["place", "name"])
def test_chat(dead: Path, name: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = hashes(dead)
    assert chat(monkeypatch, *name, str(dead)) == 0
    assert hashes(dead) == before


def test_chat_with_the_folder_s_own_code(
    dead: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, str(dead), "--trust-folder-code") == 2
    assert capsys.readouterr().err == "chatglm: the folder's code ran\n"


def test_bench(dead: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt-length", "4", "--new-tokens", "2", "--device", "cpu", "--json"]
    assert cli.main(["bench", str(dead), *options]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(dead)
    assert cli.main(["bench", "--model", str(dead), "--trust-folder-code", *options]) == 2
    assert capsys.readouterr().err == "chatglm: the folder's code ran\n"


@pytest.mark.parametrize("name", [[], ["--model"]], ids=["place", "name"])
def test_quantize(dead: Path, tmp_path: Path, name: list[str]) -> None:
    new = tmp_path / "new"
    assert cli.main(["quantize", *name, str(dead), str(new), "--bits", "8"]) == 0
    assert read_json(new / "config.json")["quantization_bit"] == 8 and stored(new)
    assert DEAD not in {file.read_text() for file in new.glob("*.py")}


@pytest.fixture
def summed(tiny_repo: Path, tmp_path: Path) -> Path:
    """A whole model folder with the hashes of its files."""
    folder = Path(shutil.copytree(tiny_repo, tmp_path / "summed"))
    write_sums(folder, hashes(folder))
    return folder


@old_names
@pytest.mark.parametrize(
    "words",
    [
        ["chat", "{folder}", "--max-new-tokens", "2"],
        ["bench", "{folder}", "--prompt-length", "4", "--new-tokens", "2", "--device", "cpu"],
        ["bench", "{folder}", "--train", "lora", "--length", "8", "--device", "cpu"],
        ["quantize", "{folder}", "{new}", "--bits", "4"],
        ["train", "sft", "{folder}", *TRAIN.split(), "--train_data", "{rows}", "--output", "{new}"],
    ],
    ids=["chat", "bench", "bench_train", "quantize", "train"],
)
def test_verify(
    summed: Path,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder that is as its hashes say is used; a damaged one is refused before all else."""
    rows, new = tmp_path / "rows.jsonl", tmp_path / "new"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [word.format(folder=summed, new=new, rows=rows) for word in words]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert cli.main([*words, "--verify"]) == 0
    shutil.rmtree(new, ignore_errors=True)
    with (summed / "model.safetensors").open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"\x7f")
    capsys.readouterr()
    assert cli.main([*words, "--verify"]) == 2
    line = (
        f"chatglm: {summed} is not what its SHA256SUMS says (model.safetensors damaged or changed)"
    )
    output = capsys.readouterr()
    assert output.out == "" and output.err.splitlines()[-1].startswith(line)
    assert not new.exists()


@old_names
def test_train_and_merge(dead: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, adapter, new = tmp_path / "rows.jsonl", tmp_path / "adapter", tmp_path / "new"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [*TRAIN.split(), "--train_data", str(data), "--output", str(adapter)]
    assert cli.main(["train", "sft", str(dead), "--trust-folder-code", *words]) == 2
    assert capsys.readouterr().err.endswith("chatglm: the folder's code ran\n")
    assert cli.main(["train", "sft", str(dead), *words]) == 0
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == str(dead)
    merge = ["merge", str(dead), str(new), "--lora", str(adapter)]
    assert cli.main([*merge, "--verify"]) == 2
    assert "has no SHA256SUMS" in capsys.readouterr().err and not new.exists()
    assert cli.main(merge) == 0
    assert stored(new).keys() == stored(dead).keys()


@pytest.mark.parametrize(
    ("fields", "called"),
    [
        ({"model_type": "gpt2"}, "a model of type gpt2"),
        ({"model_type": "chatglm", "padded_vocab_size": 65024}, "a ChatGLM2 or ChatGLM3"),
        ({"model_type": "chatglm", "padded_vocab_size": 151552}, "a GLM-4"),
        (None, "an empty folder"),
    ],
)
@pytest.mark.parametrize("command", ["chat", "bench", "quantize", "merge", "train"])
def test_strangers_are_one_line(
    command: str,
    fields: dict[str, object] | None,
    called: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, new = tmp_path / "folder", str(tmp_path / "new")
    folder.mkdir()
    if fields is not None:
        (folder / "config.json").write_text(json.dumps(fields))
    words = {
        "chat": ["chat", str(folder)],
        "bench": ["bench", str(folder)],
        "quantize": ["quantize", str(folder), new, "--bits", "4"],
        "merge": ["merge", str(folder), new, "--lora", new],
        "train": ["train", "sft", str(folder), "--train_data", "rows", "--output", new],
    }[command]
    (tmp_path / "rows").write_text("")
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"chatglm: {folder} is {called}") and err.count("\n") == 1


def test_two_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["chat", "a", "--model", "b"],
        ["quantize", "a", "c", "--model", "b", "--bits=8"],
    ):
        assert cli.main(words) == 2
        line = "chatglm: two folders are named, a and --model b: leave one out\n"
        assert capsys.readouterr().err == line
    assert cli.main(["quantize", "c", "--bits", "8"]) == 2
    assert "no folder to make c from is named" in capsys.readouterr().err


def test_the_folder_of_a_training_is_a_key() -> None:
    assert name_folder([]) == []
    assert name_folder(["--config", "a"]) == ["--config", "a"]
    assert name_folder(["m", "--config", "a"]) == ["--model", "m", "--config", "a"]
    assert name_folder(["m", "--bits", "4", "--model", "m"]) == ["--bits", "4", "--model", "m"]
    for other in (["--model", "n"], ["--model=n"]):
        with pytest.raises(ValueError, match="two folders are named, m and --model n"):
            name_folder(["m", *other])
