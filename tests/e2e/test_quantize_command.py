"""`chatglm quantize` on this repository's own model, by the real command, killed for real."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModel

from chatglm import cli
from chatglm.converting import planning

SHARD_BYTES = 10**6
# The command line, in a process that is killed as soon as its third shard has its name.
KILLED = f"""
import os, pathlib, signal, sys
from chatglm import cli
from chatglm.converting import planning

planning.MAX_SHARD_BYTES = {SHARD_BYTES}
replace = pathlib.Path.replace

def replace_and_die(path, target):
    replace(path, target)
    if target.name.startswith("model-00003-of-"):
        os.kill(os.getpid(), signal.SIGKILL)

pathlib.Path.replace = replace_and_die
sys.exit(cli.main(sys.argv[1:]))
"""

pytestmark = pytest.mark.skipif(
    not (ROOT / "pytorch_model.bin.index.json").is_file(), reason="the small model is not there"
)


def run(python: str, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [python, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )


def test_a_quantized_folder_chats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "int4"
    options = ["--bits", "4", "--group-size", "32", "--embeddings"]
    done = run(sys.executable, "-m", "chatglm", "quantize", str(ROOT), str(folder), *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{folder}: 4 bits, 5 MB\n"
    assert (folder / "model.safetensors").stat().st_size < 5 * 10**6  # of 17 MB, 4.5 bits a weight
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n"))
    options = ["--greedy", "--max-new-tokens", "16", "--device", "cpu"]
    assert cli.main(["chat", "--model", str(folder), *options]) == 0
    answer, errors = capsys.readouterr()
    assert answer.strip() and "chatglm:" not in errors


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a Unix signal")
def test_a_killed_command_is_resumed(
    quick_python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The third shard was complete, but not recorded: it is made again, the two before are kept."""
    command = ["quantize", str(ROOT), str(tmp_path / "int8"), "--bits", "8"]
    assert run(quick_python, "-c", KILLED, *command).returncode == -signal.SIGKILL
    assert not (tmp_path / "int8").exists()
    left = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "int8.part").glob("*.safetensors")}
    assert [name[:11] for name in sorted(left)] == ["model-00001", "model-00002", "model-00003"]
    monkeypatch.setattr(planning, "MAX_SHARD_BYTES", SHARD_BYTES)
    assert cli.main(command) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'int8'}: 8 bits, 11 MB\n", "")
    assert not (tmp_path / "int8.part").exists()
    shards = sorted((tmp_path / "int8").glob("*.safetensors"))
    assert len(shards) > 5
    kept = [shard.name for shard in shards if shard.stat().st_mtime_ns == left.get(shard.name)]
    assert kept == sorted(left)[:2]
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).half().quantize(8)
    wanted = model.state_dict()
    assert found.keys() == wanted.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
