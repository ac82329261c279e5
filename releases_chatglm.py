"""What differs between the supported releases of transformers, and which those are.

Owns the list of tested releases, the check of the installed one, and each name or calling
convention that changed from one of them to the next. Apart from that check nothing asks for a
version number: what an object looks like decides, so that a release that is not out yet is met by
the same code. Knows nothing of the model.

`docs/hooks.md` lists what else the model's files lean on, and the test that names each of it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from packaging import version
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

# The oldest and the newest bound what pyproject.toml installs; tools/noxfile.py tests all of them.
TESTED_TRANSFORMERS = ("4.56.2", "4.57.6", "5.8.1", "5.23.0", "5.24.0")

OLD_CACHE_NAME = "past_key_values"
NEW_CACHE_NAME = "cache"
CACHE_NAMES = (OLD_CACHE_NAME, NEW_CACHE_NAME)

# What `generate` and the outputs of models call a cache: since 5.24 by its new name.
CACHE_NAME = (
    NEW_CACHE_NAME
    if NEW_CACHE_NAME in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    else OLD_CACHE_NAME
)

logger = logging.get_logger(__name__)


def check_transformers(installed: str) -> None:
    """Stop on a release that lacks what the code needs, and tell of one that nobody has tried.

    Args:
        installed: the version string of the installed transformers.

    Raises:
        ImportError: if it is older than the oldest tested release.
    """
    oldest, newest = TESTED_TRANSFORMERS[0], TESTED_TRANSFORMERS[-1]
    found = version.parse(installed)
    if found < version.parse(oldest):
        raise ImportError(
            f"This ChatGLM code needs transformers >= {oldest}, found {installed}: "
            "run `pip install -U transformers`, or use the original remote code "
            "(revision v1.1.0 of THUDM/chatglm-6b), which works up to transformers 4.33.3."
        )
    if found.release[:2] > version.parse(newest).release[:2]:
        logger.warning_once(
            f"This ChatGLM code was tested with transformers {oldest} to {newest}, and not with "
            f"{installed}: run `chatglm bench` or `make test` if in doubt, report what differs "
            f'with the output of `transformers env`, or `pip install "transformers<={newest}"`.'
        )


def choose_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache that a caller gave under either of its names, or None.

    Raises:
        ValueError: if there are two.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            f"{OLD_CACHE_NAME} and {NEW_CACHE_NAME} are two names of one argument and got two "
            f"caches, a {type(past_key_values).__name__} and a {type(cache).__name__}: pass one."
        )
    return cache if past_key_values is None else past_key_values


def rename_cache(arguments: dict[str, Any]) -> None:
    """Put a cache among keyword arguments under the name that transformers' `generate` takes."""
    cache = choose_cache(*(arguments.pop(name, None) for name in CACHE_NAMES))
    if cache is not None:
        arguments[CACHE_NAME] = cache


def cache_of(output: Any) -> Any:
    """Return the cache in an output of a model, or None."""
    return getattr(output, CACHE_NAME)


def read_load_settings(args: tuple[Any, ...], options: dict[str, Any]) -> Mapping[str, Any]:
    """Return what `_load_pretrained_model` was told, by name.

    transformers 4 passes its settings one by one, 5 as one object in front of the rest.

    Args:
        args: its arguments after the files. options: its keyword arguments.
    """
    return vars(args[0]) if _has_settings_object(args) else options


def change_load_settings(
    args: tuple[Any, ...], options: dict[str, Any], changes: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of `read_load_settings` with some settings changed."""
    if _has_settings_object(args):
        return (dataclasses.replace(args[0], **changes), *args[1:]), options
    return args, options | changes


def _has_settings_object(args: tuple[Any, ...]) -> bool:
    return bool(args) and dataclasses.is_dataclass(args[0])


def renew_ties(model: Any) -> None:
    """Have transformers read a model's `_tied_weights_keys` again, which 5 keeps a copy of."""
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


__all__ = [
    "CACHE_NAME",
    "TESTED_TRANSFORMERS",
    "cache_of",
    "change_load_settings",
    "check_transformers",
    "choose_cache",
    "read_load_settings",
    "rename_cache",
    "renew_ties",
]
