"""Owns the settings of a training: what keys there are, the YAML file and flags that set them.

Every stage has a dataclass of its own, a `Settings` with more fields; all other keys are those of
the library's arguments class that the stage's trainer takes (`transformers.TrainingArguments` and
its children). A key of neither is refused. Does not know what a stage does with them.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

# The names that the fork's scripts and the official P-Tuning scripts have for keys of ours.
ALIASES = {
    "model_name_or_path": "model",
    "output_dir": "output",
    "train_file": "train_data",
    "train_filename": "train_data",
    "validation_file": "eval_data",
    "eval_filename": "eval_data",
    "test_file": "eval_data",
    "quantization_bit": "bits",
    "lora_train_bias": "lora_bias",
    "num_epochs": "num_train_epochs",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
}
LONG_ROWS = ("error", "cut", "skip")
BAD_ROWS = ("error", "skip")
DTYPES = ("", "float32", "bfloat16", "float16")
SETTINGS_FILE = "settings.yaml"
LORA_TARGET = "query_key_value"


class KeyProblem(ValueError):
    """A key or a value that a stage cannot take."""


@dataclass
class Settings:
    """What every stage can be told.

    Attributes:
        model: folder of the model to start from; "" is this repository.
        verify: compare the model's files with its SHA256SUMS before anything is read.
        output: folder of everything that is written.
        train_data: JSONL files, or folders of them.
        eval_data: the same, held out.
        prompt_column, response_column, history_column: what the columns of prompt/response rows are
            called.
        bad_rows: "error" to stop at a row that cannot be used, "skip" to count it and go on.
        long_rows: "error", "skip", or "cut": older rounds go first, then the question's beginning,
            then the answer's end (never its end token).
        max_length: tokens of prompt and answer; 0 is the model's window.
        resume: go on from the newest checkpoint in `output`.
        dtype: of the weights: "float32", "bfloat16", "float16" (only of those that are not
            trained); "" is float32, or what `bf16` and `fp16` name for weights that stay as they
            are.
        bits: 4 or 8 to pack the weights that are not trained (QLoRA); 0 leaves them as they are.
        group_size: columns that share a scale of packed weights; 0 is a whole row.
        lora_rank: of the adapters; 0 trains the whole model.
        lora_alpha: their scale times the rank; 0 is twice the rank.
        lora_dropout: share of an adapter's input that training leaves out.
        lora_targets: the layers that get one.
        lora_bias: "none", "all" or "lora_only", as in peft.
        adapter: folder of LoRA adapters to go on from.
        sample_prompts: questions that are answered during the training, to be read.
        sample_steps: how often; 0 is with every evaluation.
    """

    model: str = ""
    verify: bool = False
    output: str = ""
    train_data: list[str] = field(default_factory=list)
    eval_data: list[str] = field(default_factory=list)
    prompt_column: str = "prompt"
    response_column: str = "response"
    history_column: str = "history"
    bad_rows: str = "error"
    long_rows: str = "error"
    max_length: int = 0
    resume: bool = False
    dtype: str = ""
    bits: int = 0
    group_size: int = 0
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: [LORA_TARGET])
    lora_bias: str = "none"
    adapter: str = ""
    sample_prompts: list[str] = field(default_factory=list)
    sample_steps: int = 0

    def check(self) -> None:
        """Refuse values that no stage can work with.

        Raises:
            KeyProblem: naming the key, the value, and what is possible.
        """
        require(self.bad_rows in BAD_ROWS, "bad_rows", self.bad_rows, _either(BAD_ROWS))
        require(self.long_rows in LONG_ROWS, "long_rows", self.long_rows, _either(LONG_ROWS))
        require(self.dtype in DTYPES, "dtype", self.dtype, _either(DTYPES))
        require(self.bits in (0, 4, 8), "bits", self.bits, "0, 4 or 8")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "0 or more")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "in [0, 1)")
        require(self.max_length >= 0, "max_length", self.max_length, "0 or more")
        require(bool(self.output), "output", self.output, "a folder to write to")

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are trained instead of the model."""
        return bool(self.lora_rank or self.adapter)


@dataclass
class RowSettings(Settings):
    """What stages that learn from rows of files can be told beside.

    Attributes:
        group_by_length: make batches of rows of like length, which wastes less on padding.
    """

    group_by_length: bool = False


S = TypeVar("S", bound=Settings)


def require(is_fine: bool, key: str, value: object, wanted: str) -> None:
    """Refuse the value of a key.

    Raises:
        KeyProblem: unless `is_fine`.
    """
    if not is_fine:
        raise KeyProblem(f"{key} must be {wanted}, got {value!r}")


def read_settings(
    settings_class: type[S], arguments_class: type, words: Sequence[str]
) -> tuple[S, dict[str, Any]]:
    """Read a stage's settings from the command line and the file that `--config` names.

    Args:
        settings_class: of the stage.
        arguments_class: the dataclass of the library's own arguments.
        words: as typed: `--config FILE --learning_rate 1e-4 --train_data a.jsonl b.jsonl`; flags
            win over the file. A flag without a value is true.

    Returns:
        The settings, checked, and the keys that go to the library.

    Raises:
        KeyProblem: for a key that there is not, or a value that it cannot have.
    """
    flags = read_flags(words)
    config = flags.pop("config", None)
    given = {**(read_config(Path(str(config))) if config else {}), **flags}
    own = get_type_hints(settings_class)
    library = {f.name for f in dataclasses.fields(arguments_class) if f.init}
    fields: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        if key in own:
            fields[key] = coerce(key, value, own[key])
        elif key in library:
            arguments[key] = guess_number(value)
        else:
            raise KeyProblem(_unknown(key, [*own, *sorted(library)]))
    settings = settings_class(**fields)
    settings.check()
    return settings, arguments


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Raises:
        KeyProblem: if it cannot be read as that.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise KeyProblem(f"{path} is no YAML file that can be read: {error}") from error
    if not isinstance(content, dict):
        raise KeyProblem(f"{path} holds no keys: write lines such as 'learning_rate: 1e-4'")
    return {name_key(str(key)): value for key, value in content.items()}


def read_flags(words: Sequence[str]) -> dict[str, Any]:
    """Read `--key value`, `--key=value`, `--key a b c` and `--key` into keys and values.

    Of a key that is there twice the last one counts.

    Raises:
        KeyProblem: for a word that belongs to no key.
    """
    import yaml

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
    parsed = {
        key: [yaml.safe_load(text) if text else text for text in texts]
        for key, texts in values.items()
    }
    return {key: _simplify(items) for key, items in parsed.items()}


def _simplify(items: list[Any]) -> Any:
    """One value stands for itself, none for true, several for a list."""
    if not items:
        return True
    return items[0] if len(items) == 1 else items


def name_key(key: str) -> str:
    """Return our name of a key, whatever its dashes and whosever its script."""
    plain = key.strip().replace("-", "_")
    return ALIASES.get(plain, plain)


def coerce(key: str, value: Any, hint: Any) -> Any:
    """Return a value as the type of its field.

    Raises:
        KeyProblem: if it is of another type.
    """
    if get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is list:
        (part,) = get_args(hint)
        items = value if isinstance(value, list) else [value]
        return [coerce(key, item, part) for item in items]
    value = guess_number(value) if hint in (int, float) else value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    is_wrong_bool = isinstance(value, bool) and hint is not bool
    if hint in (int, float, str, bool) and (is_wrong_bool or not isinstance(value, hint)):
        raise KeyProblem(f"{key} must be of type {hint.__name__}, got {value!r}")
    return value


def guess_number(value: Any) -> Any:
    """Read what YAML takes for text but people mean as a number, as 1e-4."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and "e" not in value and "." not in value else number


def write_settings(settings: Settings, arguments: Mapping[str, Any], folder: Path) -> None:
    """Keep beside the results what they were made with, as a file for `--config`."""
    import yaml

    content = {**dataclasses.asdict(settings), **arguments}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def describe_settings(settings_class: type[Settings]) -> str:
    """Return the keys of a stage, each with its default, for `--help`."""
    lines = []
    for item in dataclasses.fields(settings_class):
        is_listed = item.default is dataclasses.MISSING
        default = item.default_factory() if is_listed else item.default  # type: ignore[misc]
        lines.append(f"  --{item.name} {default!r}")
    return "\n".join(lines)


def _either(values: Sequence[str]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"there is no key {key}{hint} (docs/training.md has the list)"


__all__ = ["KeyProblem", "RowSettings", "Settings", "read_settings", "require", "write_settings"]
