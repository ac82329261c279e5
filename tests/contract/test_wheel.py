"""A wheel of the repository: what is in it, and that it works where there is no clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from conftest import ROOT

from chatglm.checkpoints import complete

NEEDED = ("pyproject.toml", "README.md", "LICENSE", "chat_template.jinja", "*.py")
MORE = ("LICENSE", complete.TEMPLATE_FILE)
ASIDE = shutil.ignore_patterns("__pycache__")
# One process for all, because starting torch takes longer than the rest.
USE = """
import json, os, shutil, sys
from chatglm import cli, model
import chatglm

here, root = sys.argv[1:]
assert chatglm.__file__.startswith(here) and str(model.FOLDER).startswith(here), model.FOLDER
os.makedirs("empty"), os.chdir("empty")
assert cli.main(["chat"]) == 2
os.chdir("..")

from transformers import AutoModel, AutoTokenizer
import torch
from chatglm.model.configuration_chatglm import ChatGLMConfig
from chatglm.model.modeling_chatglm import ChatGLMForConditionalGeneration

sizes = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "inner_hidden_size": 64}
ChatGLMForConditionalGeneration(ChatGLMConfig(**sizes)).save_pretrained("old")
fields = {"model_type": "chatglm", "vocab_size": 130528, **sizes}
json.dump(fields, open("old/config.json", "w"))
os.remove("old/generation_config.json")
shutil.copy(f"{root}/ice_text.model", "old")
open("old/modeling_chatglm.py", "w").write("raise SystemExit('the folder\\'s code ran')")
assert cli.main(["quantize", "old", "new", "--bits", "8"]) == 0
assert sorted(os.listdir(model.FOLDER)) == sorted(
    name for name in os.listdir("new") if name.endswith((".py", ".jinja")) or name == "LICENSE"
)
chatglm.register()
for folder in ("old", "new"):
    loaded, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(loaded).__module__ == "chatglm.model.modeling_chatglm"
    ids = torch.tensor([[5, 130001, 130004]])
    assert loaded.generate(ids, min_new_tokens=2, max_new_tokens=2).shape == (1, 5)
    assert loaded.generation_config.eos_token_id == [130005, 2] and tokenizer.chat_template
assert not [name for name in sys.modules if name.startswith("transformers_modules")]
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        found = "0"
    if int(found.partition(".")[0]) < 77:
        pytest.skip(f"building needs setuptools 77 or later here, found {found}")
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    shutil.copytree(ROOT / "chatglm", source / "chatglm", ignore=ASIDE)
    for pattern in NEEDED:
        for path in ROOT.glob(pattern):
            shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(base), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = base.glob("*.whl")
    return file


def test_the_wheel_has_the_package_the_model_and_its_settings(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.json")
        for path in (ROOT / "chatglm").rglob(pattern)
    }
    model = {f"chatglm/model/{path.name}" for path in ROOT.glob("*.py")}
    assert names == package | model | {f"chatglm/model/{n}" for n in MORE}


def test_it_works_without_a_clone(wheel: Path, tmp_path: Path) -> None:
    site, place = tmp_path / "site", tmp_path / "place"
    zipfile.ZipFile(wheel).extractall(site)
    place.mkdir()
    command = [sys.executable, "-c", USE, str(site), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = "is no model folder: name one, `chatglm chat FOLDER`; a clone of the repository has a"
    assert line in done.stderr
