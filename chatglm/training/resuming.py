"""Owns a run's folder: when one is begun, gone on with, or finished, and who may.

    settings.yaml     what was asked for
    run.json          marks of the files that it reads; how it ended, when it is finished

Does not know what a checkpoint is made of (`checkpoints`), nor how a stage trains.
"""

import dataclasses
import json
import os
import shutil
import signal
import threading
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from chatglm.checkpoints.durable import UNFINISHED, write_whole
from chatglm.folder_lock import LOCK_FILE, hold_folder
from chatglm.loading import check_model_folder
from chatglm.training.checkpoints import (
    count_processes,
    find_checkpoint,
    find_fault,
    get_versions,
    list_checkpoints,
    list_whole,
    read_state,
    read_step,
    read_versions,
    rotate,
    sweep,
    tell,
)
from chatglm.training.keys.library import find_default
from chatglm.training.models import find_base
from chatglm.training.settings import (
    SETTINGS_FILE,
    KeyProblem,
    Settings,
    name_stage,
    read_config,
)
from chatglm.training.settings import write_settings as write_settings_file
from chatglm.training.sources import is_moved, mark_file, mark_sources

RUN_FILE = "run.json"
ROWS_FOLDER = "rows"  # what was rendered for trl
RESULT_ENDINGS = (".safetensors", ".bin")  # of what a finished run has beside its checkpoints
TERMINATED = 128 + signal.SIGTERM  # what a shell expects of a process that was told to end
# These keys may differ when a run goes on: they change how long it is and what is shown, not what a
# step does.
FREE_ON_RESUME = ("resume", "verify", "logging_steps", "report_to", "disable_tqdm", "output")
FREE_ON_RESUME += ("sample_prompts", "sample_steps", "save_total_limit", "eval_steps", "max_steps")
FREE_ON_RESUME += ("save_steps", "num_train_epochs", "logging_dir", "run_name")
FREE_ON_RESUME += ("early_stopping_patience", "early_stopping_threshold")
FREE_ON_RESUME += ("models", "matrix_bits")  # of an evaluation's matrix, which may grow


class Beginning(NamedTuple):
    """Where a run begins.

    Attributes:
        checkpoint: to go on from; None at the very beginning.
        figures: the last ones of a run that is finished, of which nothing is left to do; else None.
    """

    checkpoint: Path | None = None
    figures: dict[str, Any] | None = None


class Terminated(SystemExit):
    """This process was told to end."""


@contextmanager
def open_output(
    settings: Settings, given: Mapping[str, Any], arguments: Any = None
) -> Generator[Beginning, None, None]:
    """Verify the model if asked, hold the output folder, and give where the run begins.

    Of several processes the first one looks, and all do as it found. No other command writes into
    the folder until the statements inside are done.

    Args:
        settings: ours.
        given: the library's keys that were set.
        arguments: the library's arguments, which say how long the run is; None of what is never
            gone on with.

    Raises:
        ValueError: if the model's files are not as their hashes say; if another process writes into
            the folder; if it holds anything and the run is not a resumed one, or if it is and its
            settings are not those of the first run.
    """
    found: list[Any] = [None, None]
    with ExitStack() as held:
        if PartialState().is_main_process:
            try:
                if settings.verify:
                    check_model_folder(find_base(settings), verify=True)
                held.enter_context(_leaving_nothing(Path(settings.output)))
                Path(settings.output).mkdir(parents=True, exist_ok=True)
                held.enter_context(hold_folder(Path(settings.output), "chatglm train"))
                found = [_open_output(settings, given, arguments), None]
            except ValueError as problem:
                found = [None, problem]
        begun, problem = broadcast_object_list(found)
        if problem is not None:
            raise problem
        held.enter_context(_telling_how_to_go_on(Path(settings.output)))
        yield begun


@contextmanager
def _leaving_nothing(folder: Path) -> Generator[None, None, None]:
    """Remove what was written of a run that is refused before it has begun, and its folder.

    Whatever else lies in the folder was there before, or is of a run that has begun.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    before = set() if missing else {path.name for path in folder.iterdir()}
    try:
        yield
    except (ValueError, ImportError):
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if present <= {SETTINGS_FILE, RUN_FILE, ROWS_FOLDER} | before:
            for name in present - before:
                remove = shutil.rmtree if name == ROWS_FOLDER else os.unlink
                remove(folder / name)
            with suppress(OSError):  # another process may have put something there
                for place in missing:
                    place.rmdir()
        raise


@contextmanager
def _telling_how_to_go_on(folder: Path) -> Generator[None, None, None]:
    """Say how a run goes on that is interrupted, or told to end."""
    is_alone = PartialState().num_processes == 1  # a launcher ends several, whatever they wait for
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    handles = is_alone and is_main_thread and before == signal.SIG_DFL
    if handles:
        signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        if PartialState().is_main_process:
            whole = list_whole(folder)
            place = (
                f"from {whole[-1]}" if whole else "from the beginning: no checkpoint was written"
            )
            tell(f"interrupted; the same command with --resume goes on {place}")
        raise
    finally:
        if handles:
            signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: object) -> None:
    raise Terminated(TERMINATED)


def _open_output(settings: Settings, given: Mapping[str, Any], arguments: Any) -> Beginning:
    folder = Path(settings.output)
    # The settings alone are left of a run that was refused, by its data say, before it began.
    names = {path.name for path in folder.iterdir()} - {LOCK_FILE}
    present = {name.removesuffix(UNFINISHED) for name in names}
    if present <= {SETTINGS_FILE, RUN_FILE}:
        if settings.resume:
            tell(f"{folder} holds no run to go on with: it begins")
        _note_run(settings, given, mark_sources(vars(settings)))
        return Beginning()
    if not settings.resume:
        raise ValueError(
            f"the output folder {folder} is not empty: name another one, or set resume: true to "
            "go on with what was begun there"
        )
    run = _read_run(folder)
    marks = mark_sources(vars(settings))
    _check_same_stage(folder, run.get("stage"), name_stage(settings))
    _check_same_run(settings, given, run.get("sources", {}), marks)
    finished = run.get("finished")
    if finished and not _is_longer(folder, finished, arguments):
        fault = _find_fault(folder, finished)
        if fault is None:
            return _stay_finished(folder, finished)
        tell(f"{folder} is finished, but {fault}: it is made again from what is whole")
    checkpoint = _choose_checkpoint(folder, given, arguments, is_finished=bool(finished))
    _note_run(settings, given, marks)
    return Beginning(checkpoint)


def _stay_finished(folder: Path, finished: Mapping[str, Any]) -> Beginning:
    steps = finished["global_step"]
    tell(
        f"{folder} is finished with {steps} steps: nothing is left to do, and nothing is changed. "
        "It goes on with a larger max_steps or num_train_epochs"
    )
    return Beginning(figures=finished["figures"])


def _find_fault(folder: Path, finished: Mapping[str, Any]) -> str | None:
    """Return what is damaged of a finished run: a result, or the newest checkpoint."""
    for name, mark in finished["results"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if mark_file(folder / name) != mark:
            return f"{name} is not what was written"
    newest = list_checkpoints(folder)[-1:]
    return next((f"{path.name} is damaged" for path in newest if find_fault(path)), None)


# The same run


def _check_same_stage(folder: Path, then: str | None, now: str) -> None:
    if then not in (None, now):
        raise ValueError(
            f"{folder} was begun by chatglm train {then}, and {now} cannot go on with it: name "
            "another folder"
        )


def _check_same_run(
    settings: Settings,
    given: Mapping[str, Any],
    then: Mapping[str, Any],
    here: Mapping[str, Any],
) -> None:
    """Refuse to go on with other settings or other files, which would be another run.

    Args:
        settings, given: of this run.
        then, here: the marks of the files that were read, and that would be now.
    """
    folder = Path(settings.output)
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{folder} was not begun by chatglm train: it has no {SETTINGS_FILE}")
    before = {**_list_defaults(settings), **read_config(folder / SETTINGS_FILE)}
    if isinstance(before["adapter"], str):  # one folder, as older releases wrote it
        before["adapter"] = [before["adapter"]] if before["adapter"] else []
    now = {**vars(settings), **given}
    for key in sorted({*before, *now} - set(FREE_ON_RESUME)):
        old, new = before.get(key), now.get(key)
        is_marked = key in then and key in here
        if is_marked and is_moved(key, old, new):
            _check_same_files(folder, key, new, then[key] == here[key])
        elif old != new:
            raise ValueError(
                f"{key} was {old!r} when {folder} was begun and is {new!r} now: resume with the "
                "same settings, or begin anew in another folder"
            )


def _list_defaults(settings: Settings) -> dict[str, Any]:
    """Return what our keys were in a run that was begun before there were such keys."""
    return {item.name: find_default(item) for item in dataclasses.fields(settings)}


def _check_same_files(folder: Path, key: str, value: Any, is_same: bool) -> None:
    if not is_same:
        raise ValueError(
            f"{key} ({value!r}) holds something else than when {folder} was begun: bring the files "
            "back as they were, or begin anew in another folder"
        )


def _is_longer(folder: Path, finished: Mapping[str, Any], arguments: Any) -> bool:
    """Whether a finished run is to go on beyond its end; refuse to go back behind it."""
    done, key = finished["global_step"], "num_train_epochs"
    least = then = finished[key]
    if arguments.max_steps > 0:
        key, then, least = "max_steps", finished["max_steps"], done
    elif finished["max_steps"] > 0:  # how many steps so many epochs are, the trainer finds out
        return True
    wanted = getattr(arguments, key)
    if wanted in (then, least):
        return False
    if wanted < least:
        raise KeyProblem(
            f"{key}={wanted:g} is less than what {folder} has done, which is finished with {done} "
            "steps: name as much or more, or begin in another folder"
        )
    return True


def _choose_checkpoint(
    folder: Path, given: Mapping[str, Any], arguments: Any, is_finished: bool
) -> Path | None:
    """Return the checkpoint to go on from, and say which it is."""
    if given.get("save_only_model"):
        raise KeyProblem(
            "save_only_model leaves the optimizer out of checkpoints, and no run can go on from "
            "such a one: begin anew in another folder, from this one's result if you like"
        )
    sweep(folder)
    checkpoint = find_checkpoint(folder)
    if checkpoint is None and is_finished:
        raise ValueError(
            f"{folder} is finished and has no whole checkpoint any more to go on from: begin in "
            "another folder, from this one's result if you like"
        )
    if checkpoint is None:
        tell(f"{folder} has no whole checkpoint: the run begins again with its first step")
        return None
    _check_processes(checkpoint)
    if 0 < arguments.max_steps < read_step(checkpoint):
        raise KeyProblem(
            f"max_steps={arguments.max_steps} is less than what is done: {checkpoint} is the "
            "newest; name as many steps or more, or another folder"
        )
    tell(f"the run goes on from {checkpoint}{_describe_versions(checkpoint)}")
    # A run that was killed while it deleted an old one may have no other occasion.
    best = folder / f"checkpoint-{read_state(checkpoint).get('best_global_step')}"
    rotate(folder, arguments.save_total_limit, [best])
    return checkpoint


def _check_processes(checkpoint: Path) -> None:
    """Refuse another number of processes, which would make other batches."""
    then, now = count_processes(checkpoint), PartialState().num_processes
    if then not in (0, now):  # PPO keeps no random numbers, and counts itself
        raise ValueError(
            f"{checkpoint} was written by {then} processes and {now} are running now, which would "
            "be other batches: start as many as before"
        )


def _describe_versions(checkpoint: Path) -> str:
    """Return what to add where other libraries wrote a checkpoint."""
    versions = get_versions()
    changed = {k: v for k, v in read_versions(checkpoint).items() if versions.get(k) != v}
    if not changed:
        return ""
    names = " and ".join(f"{name} {changed[name]}, now {versions[name]}" for name in changed)
    return f", which was written with {names}: it goes on, but not bit for bit as it would have"


# run.json


def _read_run(folder: Path) -> dict[str, Any]:
    """Return what is kept of a run; nothing of one that an older version began."""
    try:
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        tell(f"{folder / RUN_FILE} cannot be read: files are compared by their names alone")
        return {}
    return content


def _note_run(settings: Settings, given: Mapping[str, Any], marks: Mapping[str, Any]) -> None:
    """Keep what a run was told and what it reads, before it begins or goes on."""
    folder = Path(settings.output)
    write_settings_file(dataclasses.replace(settings, resume=False), given, folder)
    _write_run(folder, {"stage": name_stage(settings), "sources": marks})


def _write_run(folder: Path, content: Mapping[str, Any]) -> None:
    write_whole(folder / RUN_FILE, (json.dumps(content, indent=1) + "\n").encode())


def note_finished(
    settings: Settings, arguments: Any, global_step: int, figures: Mapping[str, Any]
) -> None:
    """Keep that a run is finished, once all of its results are written.

    Args:
        settings: ours.
        arguments: the library's.
        global_step: steps that were done.
        figures: the last ones.
    """
    if not PartialState().is_main_process:
        return
    folder = Path(settings.output)
    length = {key: getattr(arguments, key) for key in ("max_steps", "num_train_epochs")}
    finished = {**length, "global_step": global_step, "figures": dict(figures)}
    results = [path for path in sorted(folder.iterdir()) if path.suffix in RESULT_ENDINGS]
    finished["results"] = {path.name: mark_file(path) for path in results}
    _write_run(folder, {**_read_run(folder), "finished": finished})


__all__ = ["Beginning", "note_finished", "open_output"]
