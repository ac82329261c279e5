"""Owns the package door: whether, and through which code, transformers loads folders of the family.

`register` opens it for a process, `package_code` and `folder_code` open and close it for a while.
While it is open the Auto classes load a folder of the first family with the installed model files,
in place of the Python files that lie in the folder. What an Auto class then does is in
`auto_classes`, which is imported when transformers' own is, so that nothing heavy is imported here.
"""

import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PARTS = ("configuration", "tokenization", "modeling")
AUTO_MODULES = tuple(f"transformers.models.auto.{part}_auto" for part in PARTS)

_lock = threading.RLock()
_is_registered = False
_is_open: ContextVar[bool | None] = ContextVar("chatglm_door", default=None)


def register() -> None:
    """Have transformers' Auto classes load the family's folders with the installed model files.

    For the whole process, with no `trust_remote_code` and without running the folder's Python, also
    where a caller passes `trust_remote_code=True`: `folder_code` is the way to that. Other models
    are loaded as ever. Takes microseconds, and may be called any number of times, before or after
    transformers is imported, from any thread.
    """
    global _is_registered
    _watch_imports()
    _is_registered = True


@contextmanager
def package_code() -> Iterator[None]:
    """Open the door for the statements inside, as `register` does for good."""
    _watch_imports()
    token = _is_open.set(True)
    try:
        yield
    finally:
        _is_open.reset(token)


@contextmanager
def folder_code() -> Iterator[None]:
    """Close the door for the statements inside: `trust_remote_code=True` runs a folder's Python."""
    token = _is_open.set(False)
    try:
        yield
    finally:
        _is_open.reset(token)


def is_open() -> bool:
    """Whether the installed model files are the ones to load a folder with."""
    chosen = _is_open.get()
    return _is_registered if chosen is None else chosen


def runs_folder_code() -> bool:
    """Whether the caller chose the Python files that lie in a folder (`folder_code`)."""
    return _is_open.get() is False


def load_from(folder: Any, auto_class: Any, **options: Any) -> Any:
    """Load something of a folder with an Auto class, by the installed files if not told otherwise.

    Args:
        folder: a model folder.
        auto_class: one of transformers' Auto classes.
        options: of its `from_pretrained`.
    """
    if runs_folder_code():
        return auto_class.from_pretrained(folder, trust_remote_code=True, **options)
    with package_code():
        return auto_class.from_pretrained(folder, **options)


def build_from(config: Any, auto_class: Any) -> Any:
    """Build a new model of a configuration, by the code that `load_from` would take.

    Args:
        config: as `load_from` gave it.
        auto_class: one of transformers' Auto classes of models.
    """
    if runs_folder_code():
        return auto_class.from_config(config, trust_remote_code=True)
    with package_code():
        return auto_class.from_config(config)


def find_class(folder: Any, auto_class: str) -> Any:
    """Return the class that an Auto class gives for a folder, without loading a model.

    Args:
        folder: a model folder.
        auto_class: the name of the Auto class.
    """
    from transformers import AutoConfig

    if not runs_folder_code():
        return importlib.import_module("chatglm.auto_classes").find_class(auto_class)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = load_from(folder, AutoConfig)
    return get_class_from_dynamic_module(config.auto_map[auto_class], str(folder))


class _ImportWatcher:
    """A finder of modules that prepares the Auto classes as soon as they have been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find one of transformers' Auto modules by the other finders; leave all else to them."""
        if name not in AUTO_MODULES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _prepare_after_execution(spec.loader)
        return spec


def _prepare_after_execution(loader: Any) -> None:
    execute = loader.exec_module

    def execute_and_prepare(module: ModuleType) -> None:
        execute(module)
        _prepare(module)

    loader.exec_module = execute_and_prepare


def _watch_imports() -> None:
    """Prepare the Auto modules that have been imported, and each other one when it is."""
    with _lock:
        if any(isinstance(finder, _ImportWatcher) for finder in sys.meta_path):
            return
        sys.meta_path.insert(0, _ImportWatcher())
    for name in AUTO_MODULES:
        if name in sys.modules:
            # Another thread may be in the middle of it; this waits until it is done.
            _prepare(importlib.import_module(name))


def _prepare(module: ModuleType) -> None:
    importlib.import_module("chatglm.auto_classes").prepare(module)


__all__ = [
    "build_from",
    "find_class",
    "folder_code",
    "is_open",
    "load_from",
    "package_code",
    "register",
    "runs_folder_code",
]
