"""Which Python files are a folder's model: found by reading, never by running."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from chatglm import model_files
from chatglm.model_files import find_model_files, read_entry_points


def write_folder(folder: Path, sources: dict[str, str], auto_map: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in sources.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map}), encoding="utf-8")
    return folder


def test_the_imports_are_followed_and_nothing_is_run(tmp_path: Path) -> None:
    """Also an import in a function, a circle, and one that takes a module whole."""
    sources = {
        "modeling_a.py": "from .b import x\nfrom torch import nn\nraise SystemExit\n",
        "b.py": "def f():\n    from .c import y\n    from . import d, e\n",
        "c.py": "from .b import x\nimport stray\n",
        "d.py": "",
        "e.py": "",
        "tokenization_a.py": "",
        "stray.py": "",
        "setup.py": "",
    }
    folder = write_folder(tmp_path / "m", sources, {"AutoModel": "modeling_a.A"})
    pair = {"auto_map": {"AutoTokenizer": ["tokenization_a.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(pair))
    left_out = {"stray.py", "setup.py"}
    assert find_model_files(folder) == sorted(sources.keys() - left_out)
    assert read_entry_points(folder) == {
        "modeling_a": ["AutoModel"],
        "tokenization_a": ["AutoTokenizer"],
    }


@pytest.mark.parametrize("auto_map", [None, {}, {"AutoModel": "owner/name--modeling_a.A"}])
def test_a_folder_without_code_of_its_own_has_no_files(tmp_path: Path, auto_map: Any) -> None:
    assert find_model_files(tmp_path) == []  # an adapter
    assert find_model_files(write_folder(tmp_path, {"modeling_a.py": ""}, auto_map)) == []


@pytest.mark.parametrize(
    ("auto_map", "source", "message"),
    [
        ("../../outside.A", "", r"maps AutoModel to '\.\./\.\./outside\.A': write the name of"),
        ("/etc/passwd.A", "", "maps AutoModel to '/etc/passwd.A'"),
        ("package.modeling_a.A", "", "maps AutoModel to 'package.modeling_a.A'"),
        ("modeling_b.A", "", r"modeling_b\.py is not there, and auto_map or an import names it"),
        ("modeling_a.A", "from .b import x", r"m/b\.py is not there"),
        ("modeling_a.A", "from ..b import x", r"has `from \.\.b import x`, and transformers"),
        ("modeling_a.A", "from .b.c import x", r"has `from \.b\.c import x`, and transformers"),
        ("modeling_a.A", "from . import *", r"has `from \. import \*`, and transformers"),
        ("modeling_a.A", "def f(:", r"modeling_a\.py is no Python file that can be read"),
        ("modeling_a.A", "\0", r"modeling_a\.py is no Python file that can be read"),
    ],
)
def test_what_leads_nowhere_or_outside_is_refused(
    tmp_path: Path, auto_map: str, source: str, message: str
) -> None:
    (tmp_path / "outside.py").write_text("")
    folder = write_folder(tmp_path / "m", {"modeling_a.py": source}, {"AutoModel": auto_map})
    with pytest.raises(ValueError, match=message):
        find_model_files(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '{"auto_map": [1]}', "\ufeff{}"])
def test_a_configuration_that_has_no_fields_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is no JSON file with fields by name"):
        find_model_files(tmp_path)


def test_the_presets_name_the_same_classes() -> None:
    for preset in (ROOT / "chatglm" / "presets").glob("*/config.json"):
        assert read_entry_points(preset.parent).keys() == read_entry_points(ROOT).keys()


def test_the_command_prints_what_a_shell_can_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = find_model_files(ROOT)
    monkeypatch.chdir(ROOT)
    assert model_files.main([]) == 0
    assert capsys.readouterr().out.splitlines() == names
    monkeypatch.chdir(tmp_path)
    assert model_files.main([]) == model_files.main([str(ROOT)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(ROOT / name) for name in names] * 2
    assert model_files.main([str(tmp_path)]) == 2
    assert "has no auto_map" in capsys.readouterr().err
    write_folder(tmp_path, {}, {"AutoModel": "gone.A"})
    assert model_files.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("chatglm: ") and err.count("\n") == 1


def test_no_package_is_needed() -> None:
    """The page of hashes is made without an installation, and without its settings."""
    command = [sys.executable, "-S", "-E", "tools/hash_remote_code.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
