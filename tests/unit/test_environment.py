"""What is installed around the model: releases of transformers, the seam to the engine."""

import dataclasses
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chatglm_6b import environment_chatglm
from chatglm_6b.environment_chatglm import (
    CACHE_NAME,
    CACHE_NAMES,
    SEAM_VERSION,
    TESTED_TRANSFORMERS,
    change_load_settings,
    check_transformers,
    choose_cache,
    find_engine,
    kernels_off,
    read_load_settings,
    rename_cache,
)
from conftest import build_model
from packaging.version import Version
from transformers.modeling_outputs import BaseModelOutputWithPast


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned about."""
    lines: list[str] = []
    monkeypatch.setattr(environment_chatglm.logger, "warning_once", lines.append)
    return lines


@pytest.mark.parametrize("installed", ["4.33.3", "4.56.1", "4.56.2.dev0"])
def test_old_transformers_are_refused(installed: str) -> None:
    words = rf">= 4\.56\.2, found {installed}: run `pip install -U transformers`"
    with pytest.raises(ImportError, match=words):
        check_transformers(installed)


@pytest.mark.parametrize("installed", [*TESTED_TRANSFORMERS, "4.57.0.dev0", "5.0.0rc1"])
def test_what_lies_between_the_tested_releases_needs_no_word(
    installed: str, warned: list[str]
) -> None:
    check_transformers(installed)
    assert warned == []


def test_a_correction_of_the_newest_release_needs_no_word(warned: list[str]) -> None:
    major, minor, _ = TESTED_TRANSFORMERS[-1].split(".")
    check_transformers(f"{major}.{minor}.9")
    assert warned == []
    check_transformers(f"{major}.{int(minor) + 1}.0.dev0")
    assert len(warned) == 1


def test_a_newer_release_is_told_in_one_line(warned: list[str]) -> None:
    check_transformers("6.1.0")
    (line,) = warned
    assert "\n" not in line and "not with 6.1.0" in line and "report" in line
    assert f"{TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[-1]}" in line


def test_the_releases_are_in_order() -> None:
    assert list(TESTED_TRANSFORMERS) == sorted(TESTED_TRANSFORMERS, key=Version)


def test_the_cache_is_called_as_transformers_calls_it() -> None:
    """The two spellings of one fact: the field of an output, and the release that renamed it."""
    is_renamed = Version(importlib.metadata.version("transformers")) >= Version("5.24")
    assert (CACHE_NAME == "cache") == is_renamed
    assert CACHE_NAME in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    cache: Any = object()
    assert getattr(BaseModelOutputWithPast(**{CACHE_NAME: cache}), CACHE_NAME) is cache


def test_either_name_is_taken_but_not_two_caches() -> None:
    one, other = [], []
    assert choose_cache(one, None) is one
    assert choose_cache(None, one) is one
    assert choose_cache(one, one) is one
    assert choose_cache(None, None) is None
    with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
        choose_cache(one, other)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_renamed_among_arguments(name: str) -> None:
    arguments: dict[str, Any] = {name: (cache := object()), "top_k": 1}
    rename_cache(arguments)
    assert arguments == {CACHE_NAME: cache, "top_k": 1}
    arguments = {name: None, "top_k": 1}
    rename_cache(arguments)
    assert arguments == {"top_k": 1}


@dataclasses.dataclass(frozen=True)
class Settings:
    device_map: Any = None
    dtype: Any = None


def test_loading_settings_of_both_conventions() -> None:
    one_by_one = ((), {"device_map": 1, "dtype": torch.half})
    as_object = ((Settings(1, torch.half), "rest"), {"names": 2})
    for args, options in (one_by_one, as_object):
        settings = read_load_settings(args, options)
        assert (settings["device_map"], settings["dtype"]) == (1, torch.half)
        args, options = change_load_settings(args, options, {"dtype": None})
        settings = read_load_settings(args, options)
        assert (settings["device_map"], settings["dtype"]) == (1, None)
    assert (args[1:], options) == (("rest",), {"names": 2})


# The seam to the engine


@pytest.fixture
def anew() -> Iterator[None]:
    """Have the engine looked for as in a new process, and again by whoever comes after."""
    find_engine.cache_clear()
    yield
    find_engine.cache_clear()


def test_the_engine_is_there_where_the_package_is(anew: None, warned: list[str]) -> None:
    """And only there: what CI runs without the package must run without its engine."""
    is_there = importlib.util.find_spec("chatglm") is not None
    assert (find_engine() is not None) == is_there
    assert len(warned) == (not is_there)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (None, r"chatglm\.cpu cannot be imported \("),
        (SimpleNamespace(SEAM_VERSION=SEAM_VERSION + 1), f"version {SEAM_VERSION + 1} of the seam"),
    ],
    ids=["no package", "another version"],
)
def test_without_an_engine_that_fits_torch_answers_and_a_line_says_why(
    engine: Any, words: str, anew: None, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build_model(), torch.tensor([[5, 197, 86, 301, 304]])
    with kernels_off(), torch.no_grad():
        expected = model(ids).logits
    monkeypatch.setitem(sys.modules, "chatglm.cpu", engine)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert find_engine() is None
    (line,) = warned
    assert re.search(words, line) and "pip install -U chatglm" in line and "\n" not in line
