"""Owns the whole look at a folder: what it is, every fault, everything odd, in one report.

Does not know how a report is shown, nor any fault: it asks each part in its turn.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig

from chatglm import door
from chatglm.checking.bases import compare_with_base
from chatglm.checking.files import find_odd_files, find_shard_problems
from chatglm.checking.identity import (
    Facts,
    Vocabulary,
    compare_vocabulary,
    describe_adapter,
    describe_model,
    describe_prefix,
    read_vocabulary,
)
from chatglm.checking.oddities import Subject, find_oddities
from chatglm.checking.problems import ODD, PROBLEM, Problem, gather
from chatglm.checking.quick import find_model_problems
from chatglm.checking.tensors import find_broken_records, find_broken_values, open_all
from chatglm.checkpoints.checksums import SUMS, verify_folder
from chatglm.checkpoints.prefixes import is_prefix
from chatglm.checkpoints.reading import StoredTensor, list_weight_files
from chatglm.checkpoints.recognize import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    FIRST,
    VOCABULARY_FILE,
    Folder,
    describe_stranger,
    read_object,
    recognize_folder,
)

MODEL, SCORER, PREFIX, UNREADABLE = "model", "reward model", "prefix", "unreadable"


class Report(NamedTuple):
    """What there is to say of a folder.

    Attributes:
        folder: where it is.
        kind: for programs.
        name: for people, with an article.
        facts: what it consists of.
        problems: every fault and oddity, faults first.
    """

    folder: Path
    kind: str
    name: str
    facts: Facts
    problems: list[Problem]

    def count(self, severity: str) -> int:
        """Return how many faults, or how many oddities, there are."""
        return sum(problem.severity == severity for problem in self.problems)


def inspect_folder(folder: Path, is_deep: bool = False) -> Report:
    """Look at a folder as a whole, without loading what is in it.

    Args:
        folder: any folder on this machine.
        is_deep: whether to read all weights too, one tensor at a time: are the values finite, are
            the files what their check sums say?
    """
    try:
        found = recognize_folder(folder)
    except (ValueError, OSError) as error:
        problem = Problem.of_error("configuration", CONFIG_FILE, error)
        name = f"a folder whose {CONFIG_FILE} cannot be read"
        return Report(folder, UNREADABLE, name, {}, [problem])
    looks: dict[str, Callable[[Path, Folder, bool], Report]] = {
        FIRST: _inspect_model,
        ADAPTER: _inspect_adapter,
    }
    report = looks.get(found.kind, _report_stranger)(folder, found, is_deep)
    ordered = sorted(report.problems, key=lambda problem: problem.severity == ODD)
    return report._replace(problems=ordered)


def _report_stranger(folder: Path, found: Folder, is_deep: bool) -> Report:
    error = ValueError(describe_stranger(folder, found))
    problem = Problem.of_error("not-the-family", "", error)
    return Report(folder, found.kind, found.name, {}, [problem])


def _inspect_model(folder: Path, found: Folder, is_deep: bool) -> Report:
    fields = read_object(folder / CONFIG_FILE)
    names, tensors = _open_what_can_be(folder)
    if is_prefix(tensors):
        of_base, problems = _look_at_base(folder)
        facts = describe_prefix(fields, tensors) | of_base
        problems += _look_deeply(folder, names, tensors, is_deep)
        return Report(folder, PREFIX, "a P-Tuning prefix for " + found.name, facts, problems)
    problems = find_model_problems(folder)
    vocabulary, unfit = _compare_with_vocabulary(folder)
    problems += [problem for problem in unfit if problem.code not in {p.code for p in problems}]
    problems += find_odd_files(folder, names)
    problems += find_oddities(Subject(folder, fields, names, tensors))
    problems += _look_deeply(folder, names, tensors, is_deep)
    kind, name = (MODEL, found.name)
    if found.is_scorer:
        kind, name = (SCORER, f"a reward model or classifier made of {found.name}")
    facts = describe_model(folder, fields, tensors)
    facts["rows"]["vocabulary"] = vocabulary and vocabulary.size
    return Report(folder, kind, name, facts, problems)


def _open_what_can_be(folder: Path) -> tuple[list[str], dict[str, StoredTensor]]:
    """Return the names of the weight files, and the tensors of those that are whole."""
    try:
        names = list_weight_files(folder)
    except (ValueError, OSError):
        return [], {}
    whole = [name for name in names if not find_shard_problems(folder, name)]
    return names, open_all(folder, whole)[0]


def _compare_with_vocabulary(folder: Path) -> tuple[Vocabulary | None, list[Problem]]:
    """Return the vocabulary, and where it cannot be read or is not the configuration's."""
    if not (folder / VOCABULARY_FILE).is_file():
        return None, []  # told by those who look at the files
    vocabulary, problems = read_vocabulary(folder)
    if vocabulary is None:
        return None, problems
    try:
        config = door.load_from(folder, AutoConfig)
    except (ValueError, OSError):
        return vocabulary, []  # told by those who look at the configuration
    return vocabulary, compare_vocabulary(vocabulary, config)


def _inspect_adapter(folder: Path, found: Folder, is_deep: bool) -> Report:
    names = [name for name in ADAPTER_WEIGHTS if (folder / name).is_file()][:1]
    problems = [problem for name in names for problem in find_shard_problems(folder, name)]
    if not names:
        what, remedy = f"{folder} has no weights", f"put {' or '.join(ADAPTER_WEIGHTS)} there"
        problems.append(Problem("no-weights", PROBLEM, "", what, remedy))
    tensors, unreadable = ({}, []) if problems else open_all(folder, names)
    problems += unreadable
    problems += find_odd_files(folder, names)
    if not found.base:
        what, remedy = f"{folder} does not name its base model", "name it when it is loaded"
        problems.append(Problem("no-base", ODD, "", what, remedy))
    facts = describe_adapter(folder, tensors)
    if tensors:
        of_base, unfit = _look_at_base(folder)
        facts, problems = facts | of_base, problems + unfit
    problems += _look_deeply(folder, names, tensors, is_deep)
    return Report(folder, ADAPTER, found.name, facts, problems)


def _look_at_base(folder: Path) -> tuple[Facts, list[Problem]]:
    """Return what there is to say of an adapter's base; one that cannot be read is odd."""
    try:
        return compare_with_base(folder)
    except (ValueError, OSError) as error:
        return {}, [Problem.of_error("base", "", error, ODD)]


def _look_deeply(
    folder: Path, names: list[str], tensors: dict[str, StoredTensor], is_deep: bool
) -> list[Problem]:
    """Return what only a reading of all weights can tell."""
    if not is_deep:
        return []
    problems = [*find_broken_values(tensors)]
    for name in {stored.file.name for stored in tensors.values() if stored.file}:
        if name.endswith(".bin"):
            problems += find_broken_records(folder / name)
    if (folder / SUMS).is_file():
        problems += gather("sums", SUMS, lambda: verify_folder(folder, names))
    return problems


__all__ = ["Report", "inspect_folder"]
