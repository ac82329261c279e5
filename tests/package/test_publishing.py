"""`chatglm publish`: what is sent of a folder, what keeps it from being sent, and how it is sent.

The Hub is a double that records what it is asked for; its signatures are checked against those of
the installed huggingface_hub. There is no network.
"""

import hashlib
import inspect
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MODEL_FILES, ROOT
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from chatglm import cli
from chatglm.publishing import checks, sending
from chatglm.publishing.checks import find_problems, is_place, list_remarks
from chatglm.publishing.contents import list_contents

CARD = "---\nlicense: mit\n---\n# A card\n"
INDEX = "pytorch_model.bin.index.json"
JUNK = {
    ".venv/lib/site.py": "",
    ".git/config": "[core]",
    ".env": "SECRET=1",
    ".cache/huggingface/x": "",
    "__pycache__/modeling_chatglm.cpython-311.pyc": "",
    "tests/unit/test_a.py": "",
    "chatglm/cli.py": "",
    "checkpoint-5/optimizer.pt": "",
    "runs/events": "",
    "setup.py": "",
    "settings.yaml": "output: /home/me",
    "training_args.bin": "",
    "optimizer.pt": "",
    "samples.jsonl": "",
    "value_head.safetensors": "",
    "pytorch_model-00009-of-00009.bin": "",
    "notes.md": "",
    "id_rsa": "",
    "presets/own/notes.txt": "",
    "presets/.git/config.json": "{}",
    "peft/notes.txt": "",
}


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def model(tiny_repo: Path, tmp_path: Path) -> Path:
    """A model folder that may be published as it is."""
    shutil.copytree(tiny_repo, tmp_path / "model")
    write_files(tmp_path / "model", {"README.md": CARD})
    return tmp_path / "model"


def make_adapter_folder(folder: Path, base: str = "owner/name") -> Path:
    folder.mkdir(parents=True)
    save_file({"lora": torch.ones(2)}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "base_model_name_or_path": base}
    write_files(folder, {"adapter_config.json": json.dumps(fields), "README.md": CARD})
    return folder


def shard(folder: Path) -> list[str]:
    """Put the weights of a folder into two torch shards with an index."""
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for name in names:
        torch.save({name: torch.ones(2)}, folder / name)
    write_files(folder, {INDEX: json.dumps({"metadata": {}, "weight_map": dict(zip("ab", names))})})
    return names


# What is sent


def test_a_model_folder_s_files_and_no_others(model: Path) -> None:
    files = {path.name for path in model.iterdir()}
    documents = ("LICENSE", "MODEL_LICENSE", "NOTICE", "README_zh.md", "README.base.md")
    write_files(model, dict.fromkeys(documents, "text"))
    preset = dict.fromkeys(("presets/own/config.json", f"presets/own/{INDEX}"), "{}")
    write_files(model, preset | JUNK)
    contents = list_contents(model)
    assert set(contents.kept) == {*files, *documents, *preset}
    assert files > set(MODEL_FILES)
    folders = {f"{name.split('/')[0]}/" for name in JUNK if "/" in name} - {"presets/", "peft/"}
    single = {name for name in JUNK if "/" not in name}
    inside = {"presets/own/notes.txt", "presets/.git/config.json"}
    assert contents.left_out.keys() == folders | single | inside | {"peft/"}
    assert all(contents.left_out.values())
    assert "auto_map" in contents.left_out["setup.py"] and "hidden" in contents.left_out[".env"]
    assert find_problems(contents) == []


def test_this_repository_s_own_folder(tmp_path: Path) -> None:
    """A copy of a clone with all that piles up in one."""
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":  # a file in a worktree, a folder in a clone
            shutil.copy(path, tmp_path)
    for name in ("docs", "configs", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name)
    write_files(tmp_path, JUNK)
    contents = list_contents(tmp_path)
    assert {name for name in contents.kept if name.endswith(".py")} == set(MODEL_FILES)
    root = set(contents.kept) - set(MODEL_FILES)
    weights = {path.name for path in ROOT.glob("pytorch_model-*-of-00003.bin")}
    assert root - weights == {
        "LICENSE",
        "README.md",
        "README_zh.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "ice_text.model",
        "tokenizer_config.json",
        INDEX,
    }
    assert find_problems(contents) == []
    assert ".venv/" in contents.left_out and "tests/" in contents.left_out
    listed = list_contents(ROOT)
    assert set(listed.kept) == set(contents.kept)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_adapter_folder_s_files(tmp_path: Path, kind: str) -> None:
    folder = make_adapter_folder(tmp_path / "lora")
    if kind == "bin":
        (folder / "adapter_model.safetensors").unlink()
        torch.save({"lora": torch.ones(2)}, folder / "adapter_model.bin")
    write_files(folder, JUNK)
    contents = list_contents(folder)
    assert contents.kept == ["README.md", "adapter_config.json", f"adapter_model.{kind}"]
    assert find_problems(contents) == []


def test_a_prefix_needs_no_code_of_its_own(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prefix"
    make_adapter_folder(folder / "peft")
    config = json.loads((model / "config.json").read_text()) | {"pre_seq_len": 4}
    write_files(folder, {"config.json": json.dumps(config), "README.md": CARD})
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.ones(4, 2)}
    torch.save(prefix, folder / "pytorch_model.bin")
    contents = list_contents(folder)
    adapter = ["peft/adapter_config.json", "peft/adapter_model.safetensors"]
    assert contents.kept == ["README.md", "config.json", *adapter, "pytorch_model.bin"]
    assert find_problems(contents) == []
    torch.save(prefix | {"lm_head.weight": torch.ones(2)}, folder / "pytorch_model.bin")
    problems = find_problems(list_contents(folder))
    assert any("_chatglm.py is not there" in problem for problem in problems)


def test_weights_that_would_not_be_read_stay_here(model: Path) -> None:
    names = shard(model)
    assert {*names, INDEX} < set(list_contents(model).kept)
    torch.save({"c": torch.ones(2)}, model / "pytorch_model.bin")
    contents = list_contents(model)
    assert "pytorch_model.bin" in contents.kept
    assert {*names, INDEX} <= contents.left_out.keys()


# What keeps a folder here


def test_all_problems_are_found_at_once(
    model: Path, capsys: pytest.CaptureFixture[str], hub: Any
) -> None:
    first, _ = shard(model)
    (model / first).unlink()
    (model / "ice_text.model").unlink()
    (model / "README.md").unlink()
    (model / "masking_chatglm.py").unlink()
    assert cli.main(["publish", str(model), "--repo", "me/mine"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("chatglm: ") for line in lines) and len(lines) == 4
    for words in (first, "ice_text.model", "no README.md", "masking_chatglm.py is not there"):
        assert sum(words in line for line in lines) == 1, words
    assert hub.calls == []


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"README.md": CARD, "secret.txt": "x"})
    (problem,) = find_problems(list_contents(tmp_path))
    assert "has neither config.json nor adapter_config.json" in problem
    with pytest.raises(ValueError, match="is no folder: name a model folder"):
        list_contents(tmp_path / "gone")


def point_to_lfs(folder: Path, name: str) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / name).write_text(text)


def cut_in_half(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def change_head(folder: Path, head: str) -> None:
    (folder / "README.md").write_text(f"---\n{head}\n---\n")


def add_field(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def write_sums(folder: Path, **changes: str) -> None:
    sums = {"config.json": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()}
    lines = [f"{digest}  {name}\n" for name, digest in (sums | changes).items()]
    (folder / "SHA256SUMS").write_text("".join(lines))


def leave_for(folder: Path, name: str) -> None:
    """Put a link in the place of a file, to where it is now."""
    place = folder.parent / "elsewhere"
    (folder / name).rename(place)
    (folder / name).symlink_to(place)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: point_to_lfs(f, "model.safetensors"), "model.safetensors is a Git-LFS pointer"),
        (lambda f: point_to_lfs(f, "ice_text.model"), "ice_text.model is a Git-LFS pointer"),
        (cut_in_half, r"is no complete weight file"),
        (lambda f: leave_for(f, "model.safetensors"), "model.safetensors is a link to "),
        (lambda f: leave_for(f, "modeling_chatglm.py"), "modeling_chatglm.py is a link to "),
        (lambda f: change_head(f, "tags: [x]"), "README.md says no licence in its head"),
        (lambda f: change_head(f, "a: ["), r"the head of .*README.md is no YAML"),
        (lambda f: change_head(f, "license: mit\nbase_model: /a/b"), "has the base_model '/a/b'"),
        (lambda f: add_field(f, _name_or_path="/home/me/x"), "_name_or_path='/home/me/x'"),
        (
            lambda f: write_sums(f, **{"config.json": "0" * 64}),
            "config.json is not the file whose hash",
        ),
        (lambda f: write_sums(f, **{"notes.md": "0" * 64}), "SHA256SUMS has notes.md, which is"),
        (lambda f: write_sums(f, **{"../x": "0" * 64}), "SHA256SUMS names '../x', which is out"),
        (lambda f: write_sums(f, notes="0"), "SHA256SUMS is '0  notes', and not 64"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "has no tokenizer_config.json"),
    ],
)
def test_each_problem_is_named(model: Path, spoil: Any, message: str) -> None:
    write_sums(model)
    assert find_problems(list_contents(model)) == []
    spoil(model)
    if "hash" not in message and "SHA256SUMS" not in message:
        write_sums(model)
    (problem,) = find_problems(list_contents(model))
    assert re.search(message, problem) and "\n" not in problem


@pytest.mark.parametrize(
    "weight_map", [{"a": "../elsewhere.bin"}, {"a": "*.bin"}, {"a": "/x.bin"}, {"a": ".x"}, {}, []]
)
def test_an_index_that_leads_elsewhere_is_refused(model: Path, weight_map: Any) -> None:
    shard(model)
    torch.save({"a": torch.ones(2)}, model.parent / "elsewhere.bin")
    write_files(model, {INDEX: json.dumps({"weight_map": weight_map})})
    contents = list_contents(model)
    assert not [name for name in contents.kept if ".bin" in name]
    (problem,) = find_problems(contents)
    assert problem.startswith(str(model / INDEX)) and "take the index that came" in problem


def test_a_preset_folder_that_is_a_link_is_refused(model: Path) -> None:
    outside = model.parent / "outside" / "own"
    write_files(outside, {"config.json": "{}"})
    (model / "presets").symlink_to(outside.parent)
    (problem,) = find_problems(list_contents(model))
    assert problem.startswith("presets/own/config.json is a link to ")


def test_an_adapter_names_its_base_for_others(tmp_path: Path) -> None:
    folder = make_adapter_folder(tmp_path / "lora", str(tmp_path / "base"))
    (problem,) = find_problems(list_contents(folder))
    assert problem.startswith("adapter_config.json names its origin by a place on this machine")
    (folder / "adapter_model.safetensors").unlink()
    assert len(find_problems(list_contents(folder))) == 2


@pytest.mark.parametrize("name", ["/a/b", "./a", "../a", "~/a", "C:\\a", "a\\b", "a/b/c"])
def test_places_and_names_are_told_apart(name: str) -> None:
    assert is_place(name) and not is_place("owner/name") and not is_place("")


def test_remarks_do_not_keep_a_folder_here(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_field(model, vocab_size=130528)
    monkeypatch.setattr(checks, "find_model_problems", lambda folder: [])  # it has no such rows
    text = "[a](docs/a.md) [b](https://b) [c](#c) [d](config.json) ![e](e.png#x)"
    write_files(model, {"README.md": f"---\nlicense: unknown\n---\n{text}"})
    contents = list_contents(model)
    assert find_problems(contents) == []
    licence, unknown, links = list_remarks(contents)
    assert "MODEL_LICENSE" in licence and "unknown" in unknown
    assert links.endswith("links to what stays here: docs/a.md, e.png")
    write_files(model, {"MODEL_LICENSE": "text", "README.md": CARD})
    assert list_remarks(list_contents(model)) == []


# The Hub


class Hub:
    """Stands for `HfApi`: records calls and answers as the Hub would."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.files = [".gitattributes"]
        self.private = True
        self.error: Exception | None = None

    def __call__(self, **options: Any) -> "Hub":
        inspect.signature(HfApi).bind(**options)
        return self

    def _note(self, name: str, *args: Any, **options: Any) -> None:
        inspect.signature(getattr(HfApi, name)).bind(None, *args, **options)
        self.calls.append((name, args, options))

    def create_repo(self, *args: Any, **options: Any) -> Any:
        self._note("create_repo", *args, **options)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(repo_id=args[0] if "/" in args[0] else f"me/{args[0]}")

    def repo_info(self, *args: Any, **options: Any) -> Any:
        self._note("repo_info", *args, **options)
        return SimpleNamespace(private=self.private)

    def list_repo_files(self, *args: Any, **options: Any) -> list[str]:
        self._note("list_repo_files", *args, **options)
        return self.files

    def upload_folder(self, **options: Any) -> Any:
        self._note("upload_folder", **options)
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    double = Hub()
    monkeypatch.setattr(sending, "HfApi", double)
    monkeypatch.setattr(sending, "get_token", lambda: "hf_token")
    return double


def publish(folder: Path, *options: str) -> int:
    return cli.main(["publish", str(folder), "--repo", "me/mine", *options])


def test_exactly_the_listed_files_are_sent_in_one_commit(
    model: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(model, JUNK)
    assert publish(model, "--message", "The first one") == 0
    assert [name for name, _, _ in hub.calls] == ["create_repo", "list_repo_files", "upload_folder"]
    assert hub.calls[0][1:] == (("me/mine",), {"private": None, "exist_ok": True})
    sent = hub.calls[-1][2]
    assert (sent["repo_id"], sent["commit_message"]) == ("me/mine", "The first one")
    everything = [p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()]
    chosen = set(filter_repo_objects(everything, allow_patterns=sent["allow_patterns"]))
    assert chosen == set(list_contents(model).kept) and sent["folder_path"] == model
    out = capsys.readouterr().out
    assert out.endswith("https://hub/commit/1\n") and "left out:\n  .cache/  (hidden" in out


def test_a_dry_run_prints_the_list_and_asks_nobody(
    model: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "get_token", lambda: pytest.fail("nobody need be logged in"))
    assert publish(model, "--dry-run") == 0
    out, err = capsys.readouterr()
    kept = list_contents(model).kept
    sizes = {name: f"{(model / name).stat().st_size:,}" for name in kept}
    lines = [line.split() for line in out.splitlines()]
    assert lines[: len(kept)] == [[sizes[name], name] for name in kept]
    assert lines[len(kept)][1:] == ["bytes", "in", str(len(kept)), "files"]
    assert out.endswith("me/mine: nothing was sent (--dry-run)\n")
    assert hub.calls == [] and err == ""


def test_a_dry_run_fails_for_what_would_not_be_sent(model: Path, hub: Hub) -> None:
    (model / "README.md").unlink()
    assert publish(model, "--dry-run") == 2 and hub.calls == []


def test_a_name_alone_is_a_repository_of_one_s_own(model: Path, hub: Hub) -> None:
    assert cli.main(["publish", str(model), "--repo", "mine"]) == 0
    assert hub.calls[-1][2]["repo_id"] == "me/mine"
    assert hub.calls[-1][2]["commit_message"].startswith("Publish model with chatglm ")


def test_private_is_private_or_nothing(
    model: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(model, "--private") == 0
    assert hub.calls[0][2]["private"] is True
    hub.calls.clear()
    hub.private = False  # it was there before
    assert publish(model, "--private") == 2
    assert "upload_folder" not in [name for name, _, _ in hub.calls]
    assert "me/mine is there already, and public: name another" in capsys.readouterr().err


def test_other_weights_in_the_repository_are_no_company(
    model: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files = ["pytorch_model.bin.index.json", "model.safetensors", "old/pytorch_model.bin"]
    assert publish(model) == 2
    err = capsys.readouterr().err
    assert "does not have, pytorch_model.bin.index.json, and they might" in err
    assert [name for name, _, _ in hub.calls] == ["create_repo", "list_repo_files"]
    hub.files = ["model.safetensors", "README.md"]
    assert publish(model) == 0


def test_nobody_is_logged_in(
    model: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "get_token", lambda: None)
    assert publish(model) == 2 and hub.calls == []
    err = capsys.readouterr().err
    assert err.startswith("chatglm: nobody is logged in") and "`hf auth login`" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [sending.TRANSPORT_ERROR("no route"), ConnectionError("no route"), OSError("no route")]
)
def test_what_the_hub_answers_is_one_line(
    model: Path, hub: Hub, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    hub.error = error
    assert publish(model) == 2
    err = capsys.readouterr().err
    assert err.startswith("chatglm: me/mine could not be written to on the Hub: no route (may the")
    assert err.count("\n") == 1
    assert issubclass(HfHubHTTPError, sending.TRANSPORT_ERROR)


@pytest.mark.parametrize("repo", ["a/b/c", "/home/me", "a b", ""])
def test_what_is_no_name_of_a_repository_is_refused(
    model: Path, hub: Hub, capsys: pytest.CaptureFixture[str], repo: str
) -> None:
    assert cli.main(["publish", str(model), "--repo", repo, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("chatglm: ") and err.count("\n") == 1
