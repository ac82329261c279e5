"""Owns what transformers' Auto classes do with a folder of the family while the door is open.

Their `from_pretrained` and `from_config` are wrapped: a folder is recognized by what it contains,
then read with the installed classes, and completed. Everything that is not of the family, and
everything while the door is closed, goes on as it came. Transformers' own registry alone would not
do: which of a registered class and a folder's Python wins differs from release to release and from
one Auto class to the next, and later models that share the name "chatglm" could not be loaded.
"""

import functools
import importlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from chatglm import door
from chatglm.checkpoints import complete
from chatglm.checkpoints.recognize import (
    ADAPTER,
    EMPTY,
    LATER,
    VOCABULARY_FILE,
    WITHOUT_CONFIG,
    Folder,
    describe_stranger,
    read_object,
    recognize_fields,
    recognize_folder,
)

CONFIG_MODULE, TOKENIZER_MODULE = "configuration_chatglm", "tokenization_chatglm"
CONFIG_CLASS, TOKENIZER_CLASS = "ChatGLMConfig", "ChatGLMTokenizer"
# Of no meaning for the installed classes: whose code runs is settled.
CODE_OPTIONS = ("trust_remote_code", "code_revision")
WRAPPED = "chatglm_wrapped"

_lock = threading.RLock()
_registered: set[str] = set()
_noted: set[Any] = set()


class NoModelFolderError(OSError, ValueError):
    """A folder without a model: transformers says so by an OSError, the commands by the other."""


def prepare(module: ModuleType) -> None:
    """Wrap the methods of the Auto classes of a module of transformers, once.

    Args:
        module: one that defines Auto classes.
    """
    wrappers: dict[str, dict[str, Callable[..., Any]]] = {
        "AutoConfig": {"from_pretrained": _load_config},
        "AutoTokenizer": {"from_pretrained": _load_tokenizer},
    }
    for name in complete.find_auto_map():
        if name != "AutoConfig":
            wrappers[name] = {"from_pretrained": _load_model, "from_config": _build_model}
    for name, methods in wrappers.items():
        # A module also has the Auto classes that it imports from another, which wraps them itself.
        if getattr(vars(module).get(name), "__module__", None) == module.__name__:
            for method, wrapper in methods.items():
                _wrap(getattr(module, name), method, wrapper)


def _wrap(auto_class: Any, method: str, wrapper: Callable[..., Any]) -> None:
    with _lock:
        original = getattr(auto_class, method)
        if hasattr(original, WRAPPED):
            return

        @functools.wraps(original.__func__)
        def wrapped(cls: Any, *args: Any, **kwargs: Any) -> Any:
            call = functools.partial(original.__func__, cls)
            if not door.is_open():
                return call(*args, **kwargs)
            return wrapper(call, auto_class.__name__, *args, **kwargs)

        setattr(wrapped, WRAPPED, True)
        setattr(auto_class, method, classmethod(wrapped))


def find_class(auto_class: str) -> Any:
    """Return the installed class for one of transformers' Auto classes.

    Args:
        auto_class: its name.
    """
    if auto_class == "AutoTokenizer":
        return getattr(_import_file(TOKENIZER_MODULE), TOKENIZER_CLASS)
    file, _, name = complete.find_auto_map()[auto_class].partition(".")
    return getattr(_import_file(file), name)


def _import_file(name: str) -> ModuleType:
    return importlib.import_module(f"chatglm.model.{name}")


def _load_config(call: Callable[..., Any], name: str, path: Any, **kwargs: Any) -> Any:
    found = _recognize(path, kwargs)
    if found is None or not found.is_first_family:
        return call(path, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in CODE_OPTIONS}
    fields, kwargs = _read_fields(path, {**kwargs, "name_or_path": path})
    return _find_config_class().from_dict(complete.complete_fields(fields), **kwargs)


def _load_tokenizer(
    call: Callable[..., Any], name: str, path: Any, *args: Any, **kwargs: Any
) -> Any:
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    found = _recognize(path, kwargs, is_tokenizer=True)
    _check_settings(path, kwargs)
    own = get_tokenizer_config(path, **_without_code(kwargs)) if found is not None else {}
    if found is None or not (found.is_first_family or _has_our_vocabulary(path, found, own)):
        return call(path, *args, **kwargs)
    for option in ("config", "use_fast", *CODE_OPTIONS):
        kwargs.pop(option, None)
    options = complete.complete_tokenizer(found.vocab_size or None, own)
    tokenizer_class = find_class(name)
    _note_auto_class(tokenizer_class, name)
    tokenizer = tokenizer_class.from_pretrained(path, *args, **{**options, **kwargs})
    if tokenizer.chat_template is None:
        tokenizer.chat_template = complete.read_template()
    return tokenizer


def _check_settings(path: Any, kwargs: dict[str, Any]) -> None:
    """Name a file of the tokenizer's that is broken, where transformers would not."""
    file = Path(path, kwargs.get("subfolder") or "", complete.TOKENIZER_FILE)
    if file.is_file():
        read_object(file)


def _load_model(call: Callable[..., Any], name: str, path: Any, *args: Any, **kwargs: Any) -> Any:
    config = kwargs.get("config")
    if _is_foreign(config) or not (_is_ours(config) or _leads_to_family(path, kwargs)):
        return call(path, *args, **kwargs)
    _register(name)
    loaded = call(path, *args, **_without_code(kwargs))
    _complete_generation(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def _build_model(call: Callable[..., Any], name: str, config: Any, **kwargs: Any) -> Any:
    if not _is_ours(config):
        return call(config, **kwargs)
    _register(name)
    model = call(config, **_without_code(kwargs))
    _complete_generation(model)
    return model


def _recognize(path: Any, kwargs: dict[str, Any], is_tokenizer: bool = False) -> Folder | None:
    """Say what a place holds, and None if transformers must find out itself.

    Raises:
        NoModelFolderError: for an empty folder, or without a configuration where one is needed.
        ValueError: for a later model that goes by the family's name, if its code is not trusted.
    """
    found = _look(path, kwargs)
    if found is None:
        return None
    if found.kind == EMPTY or (found.kind in WITHOUT_CONFIG and not is_tokenizer):
        raise NoModelFolderError(describe_stranger(path, found))
    if found.kind == LATER and not kwargs.get("trust_remote_code"):
        raise ValueError(describe_stranger(path, found))
    return found


def _look(path: Any, kwargs: dict[str, Any]) -> Folder | None:
    """Read what a folder, or the configuration of a repository on the Hub, says of itself."""
    if kwargs.get("gguf_file"):
        return None
    if os.path.isdir(path):
        return recognize_folder(Path(path, kwargs.get("subfolder") or ""))
    try:
        return recognize_fields(_read_fields(path, _without_code(kwargs))[0])
    except OSError:  # transformers says it better, or finds another way
        return None


def _leads_to_family(path: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a place holds a model of the family, or an adapter for one.

    Raises:
        ValueError: for an adapter whose base has other weights than it was trained on.
    """
    found = _recognize(path, kwargs)
    if found is not None and found.kind == ADAPTER and found.base:
        base, found = found.base, _recognize(found.base, {})
        if found is not None and found.is_first_family and os.path.isdir(base):
            from chatglm.adapters.bases import check_base  # heavy, and of this road alone

            check_base(Path(path), Path(base).resolve())
    return found is not None and found.is_first_family


def _has_our_vocabulary(path: Any, found: Folder, own: dict[str, Any]) -> bool:
    """Whether a folder without a model is one that a tokenizer of the family was saved in."""
    is_named_so = own.get("tokenizer_class") == TOKENIZER_CLASS
    is_alone = found.kind in {ADAPTER, *WITHOUT_CONFIG}
    return is_alone and is_named_so and Path(path, VOCABULARY_FILE).is_file()


def _read_fields(path: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a place's config.json, and the options that were not used for it."""
    from transformers import PretrainedConfig

    fields, unused = PretrainedConfig.get_config_dict(path, **kwargs)
    return dict(fields), unused


def _without_code(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in CODE_OPTIONS}


def _find_config_class() -> Any:
    config_class = find_class("AutoConfig")
    _note_auto_class(config_class, "AutoConfig")
    return config_class


def _is_ours(config: Any) -> bool:
    return type(config).__module__ == f"chatglm.model.{CONFIG_MODULE}"


def _is_foreign(config: Any) -> bool:
    """Whether a caller brought a configuration of another class, and so of other code."""
    from transformers import PretrainedConfig

    return isinstance(config, PretrainedConfig) and not _is_ours(config)


def _register(auto_class: str) -> None:
    """Tell transformers of the installed classes, as anyone does who adds a model to it."""
    transformers = importlib.import_module("transformers")
    with _lock:
        if auto_class in _registered:
            return
        config_class, model_class = _find_config_class(), find_class(auto_class)
        getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
        _note_auto_class(model_class, auto_class)
        _registered.add(auto_class)


def _note_auto_class(our_class: Any, auto_class: str) -> None:
    """Have `save_pretrained` put the class's file, and those it needs, beside what it saves."""
    if our_class not in _noted:
        our_class.register_for_auto_class(auto_class)
        _noted.add(our_class)


def _complete_generation(model: Any) -> None:
    """Give a model the defaults and the end tokens that its folder does not say."""
    from transformers import GenerationConfig

    settings = getattr(model, "generation_config", None)
    if settings is None or not model.can_generate():
        return
    ids = {name: getattr(model.config, name) for name in complete.GENERATION_IDS}
    wanted = complete.complete_generation(model.config.vocab_size, ids)
    if getattr(settings, "_from_model_config", False):  # no one chose any of it
        model.generation_config = GenerationConfig.from_dict(wanted)
        return
    for name in ids:
        if getattr(settings, name, None) is None:
            setattr(settings, name, wanted[name])


__all__ = ["NoModelFolderError", "find_class", "prepare"]
