"""How processes end: one of several leaves before C++ takes its objects apart."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

LEAVE = """
import atexit, sys
from chatglm.training.processes import leave
atexit.register(print, "taken apart")
print("done")
leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("world_size", [None, "1", "2"])
def test_a_process_ends_with_its_code_and_its_output(code: int, world_size: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    env |= {"PYTHONPATH": str(ROOT)} | ({"WORLD_SIZE": world_size} if world_size else {})
    command = [sys.executable, "-c", LEAVE, str(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = ["done"] if world_size == "2" else ["done", "taken apart"]
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (code, lines)
