"""Owns how keys and values are read as they are typed: a YAML file, and words of a command line.

Does not know which keys there are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatglm.training.keys.problems import KeyProblem


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Raises:
        KeyProblem: if it cannot be read as that, naming the line; for a key that is there twice.
    """
    return {key: value for key, (value, _) in read_lines(path).items()}


def read_lines(path: Path) -> dict[str, tuple[Any, int]]:
    """Read a YAML file of keys; returns the value of each, and the line it is in.

    Raises:
        KeyProblem: as `read_config`.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise KeyProblem(f"{_locate(path, error)} is no YAML: {_describe(error)}") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise KeyProblem(f"{path} is no YAML file that can be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(root, yaml.MappingNode):
        raise KeyProblem(f"{path} holds no keys: write lines such as 'learning_rate: 1e-4'")
    lines: dict[str, int] = {}
    for node, _ in root.value:
        key, line = name_key(str(node.value)), node.start_mark.line + 1
        if key in lines:
            where = f"lines {lines[key]} and {line}"
            raise KeyProblem(f"{path} has the key {key} twice, in {where}: leave one out")
        lines[key] = line
    named = {name_key(str(key)): value for key, value in content.items()}
    return {key: (value, lines.get(key, 0)) for key, value in named.items()}


def _locate(path: Path, error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    return str(path) if mark is None else f"{path}:{mark.line + 1}"


def _describe(error: Any) -> str:
    """Return what a YAML reader says, without the lines that it points into."""
    said = (getattr(error, "context", None), getattr(error, "problem", None))
    return ", ".join(part for part in said if part) or str(error)


def read_flags(words: Sequence[str]) -> dict[str, Any]:
    """Read `--key value`, `--key=value`, `--key a b c` and `--key` into keys and values.

    Of a key that is there twice the last one counts.

    Raises:
        KeyProblem: for a word that belongs to no key, or is no value.
    """
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            current = values[name_key(key)] = [value] if equals else []
        elif current is None:
            raise KeyProblem(f"{word!r} belongs to no key: write --key value")
        else:
            current.append(word)
    parsed = {key: [_parse(key, text) for text in texts] for key, texts in values.items()}
    return {key: _simplify(items) for key, items in parsed.items()}


def _parse(key: str, text: str) -> Any:
    """Read a word as YAML does; what is no YAML is a text, as a name of a file may be."""
    import yaml

    if not text:
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        if text[0] in "[{":
            raise KeyProblem(f"{key} {text!r} is no YAML: {_describe(error)}") from error
        return text


def _simplify(items: list[Any]) -> Any:
    """One value stands for itself, none for true, several for a list."""
    if not items:
        return True
    return items[0] if len(items) == 1 else items


def name_key(key: str) -> str:
    """Return a key without what the command line writes otherwise."""
    return key.strip().replace("-", "_")


__all__ = ["name_key", "read_config", "read_flags", "read_lines"]
