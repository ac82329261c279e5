"""Commands that write folders, killed, out of disk, or two at once: the result is whole or absent.

A case runs a command in a process of its own and kills it at a random moment (kill -9), or lets no
file grow beyond a random size, which fails as a full disk does, or starts the same command twice at
once. The target must then be absent or complete; the command, run again, completes it; its files
are byte for byte those of a run that nothing disturbed; and the source is as it was.
"""

import functools
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.endurance.campaign import Campaign, Case, Finding
from benchmarks.endurance.folders import scratch, write_sources
from chatglm.checkpoints.checksums import hash_file
from chatglm.cli import COMMANDS, main

SECONDS = 120.0
REFUSED = 2
IN_PLACE = "adopt in place"
WAYS = ("kill", "kill", "full disk", "two at once")
Words = list[str]


def list_commands(target: Path) -> dict[str, Words]:
    """Return every command of this version that writes a folder, with a target."""
    plain, adapter = str(scratch() / "plain"), str(scratch() / "adapter")
    commands = {
        "quantize": ["quantize", plain, str(target), "--bits", "4"],
        "merge": ["merge", plain, str(target), "--lora", adapter],
        "adopt": ["adopt", str(scratch() / "official"), "--out", str(target)],
        IN_PLACE: ["adopt", str(target)],
    }
    return {name: words for name, words in commands.items() if words[0] in COMMANDS}


def make_ready(name: str, target: Path) -> None:
    """Put what a command changes in place where its target is; nothing for the others."""
    shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir()
    if name == IN_PLACE:
        shutil.copytree(scratch() / "official", target)


def start(words: Words, file_limit: int | None = None) -> int:
    """Start a command in a fork, and return the process."""
    process = os.fork()
    if process:
        return process
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        os._exit(main(words))
    finally:
        os._exit(99)


def wait(process: int) -> int:
    """Return the exit code of a process; `Finding` if it hangs."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise Finding(f"hangs for {SECONDS} s")


def hash_folder(folder: Path) -> dict[str, str]:
    """Return the hashes of all files of a folder, by their paths in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hash_file(path) for path in files}


def check_target(target: Path, truth: dict[str, str], when: str) -> None:
    """Raise `Finding` if a target is there and not what it should be."""
    if target.exists() and any(target.iterdir()) and hash_folder(target) != truth:
        found = hash_folder(target)
        odd = sorted(name for name in truth | found if truth.get(name) != found.get(name))
        raise Finding(f"{when} {target.name} differs in {odd[:5]}")


def disturb(way: str, words: Words, seconds: float, largest: int, rng: random.Random) -> None:
    """Run a command and disturb it; `Finding` for an exit code that it must not have."""
    if way == "kill":
        process = start(words)
        time.sleep(rng.uniform(0, 1.1 * seconds))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return
    if way == "full disk":
        limit = int(10 ** rng.uniform(1, math.log10(largest)))
        codes = [wait(start(words, limit))]
    else:
        processes = [start(words)]
        time.sleep(rng.choice((0, rng.uniform(0, seconds))))
        codes = [wait(process) for process in (*processes, start(words))]
        if 0 not in codes:
            raise Finding(f"two at once end with {codes}")
    if set(codes) - {0, REFUSED}:
        raise Finding(f"exit codes {codes}")


def disturb_and_repeat(
    truths: dict[str, tuple[dict[str, str], float, int]], rng: random.Random
) -> str:
    """Disturb one command, look at what is there, and run it again."""
    name, way = rng.choice(list(truths)), rng.choice(WAYS)
    truth, seconds, largest = truths[name]
    place = scratch() / "made"
    target = place / "target"
    make_ready(name, target)
    words = list_commands(target)[name]
    sources = [scratch() / part for part in ("plain", "official", "adapter")]
    before = [hash_folder(source) for source in sources]
    try:
        disturb(way, words, seconds, largest, rng)
        repeat(name, words, target, truth)
        if left := sorted(path.name for path in place.iterdir() if path != target):
            raise Finding(f"leaves {left}")
        if [hash_folder(source) for source in sources] != before:
            raise Finding("the source is changed")
    except Finding as finding:
        raise Finding(f"{name}, {way}: {finding}") from None
    return f"{name}, {way}"


def repeat(name: str, words: Words, target: Path, truth: dict[str, str]) -> None:
    """Look at a target, run its command again, and look again; `Finding` for what is not whole.

    What is changed in place may be half done until then, and is what it was when it is undone.
    """
    is_made = name != IN_PLACE and target.exists() and any(target.iterdir())
    if name != IN_PLACE:
        check_target(target, truth, "then")
    code = wait(start(words))
    if code != (REFUSED if is_made else 0):
        raise Finding(f"run again, it ends with {code}")
    check_target(target, truth, "run again,")
    if name == IN_PLACE:
        code = wait(start([*words, "--undo"]))
        check_target(target, hash_folder(scratch() / "official"), f"undone with {code},")


def prepare() -> Case:
    """Write the sources, and run every command undisturbed."""
    write_sources()
    truths: dict[str, Any] = {}
    target = scratch() / "true" / "target"
    for name, words in list_commands(target).items():
        begin = 0.0
        for _ in range(2):  # the first imports what the forks then have
            make_ready(name, target)
            begin = time.monotonic()
            if main(words):
                raise RuntimeError(f"{name} fails undisturbed")
        seconds = time.monotonic() - begin
        files = [path.stat().st_size for path in target.iterdir() if path.is_file()]
        truths[name] = (hash_folder(target), seconds, max(files))
    sys.stdout.flush()
    return functools.partial(disturb_and_repeat, truths)


CAMPAIGN = Campaign(
    "kills", "Commands killed, out of disk, or run twice at once", "runs", 500, 1, prepare
)
