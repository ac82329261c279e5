"""Owns the settings of a training: what keys there are, the YAML file and flags that set them.

Every stage has a dataclass of its own, a `Settings` with more fields; all other keys are those of
the library's arguments class that the stage's trainer takes (`transformers.TrainingArguments` and
its children). A key of neither is refused. Does not know what a stage does with them.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from chatglm.checkpoints.durable import write_whole
from chatglm.data.settings import DataSettings
from chatglm.training.keys.library import LibraryKey, list_fields
from chatglm.training.keys.names import NAMES
from chatglm.training.keys.problems import (
    KeyProblem,
    collect_problems,
    either,
    refuse_all,
    require,
)
from chatglm.training.keys.reading import read_config, read_flags, read_lines
from chatglm.training.keys.translating import find_contradictions, merge_defaults, translate
from chatglm.training.keys.values import check_kind, coerce, guess_number
from chatglm.training.layers import expand_modules, expand_targets

LONG_ROWS = ("error", "cut", "skip")
DTYPES = ("", "float32", "bfloat16", "float16")
SETTINGS_FILE = "settings.yaml"
LORA_TARGET = "query_key_value"
ADAPTER_STARTS = (True, "true", "gaussian")
LISTED = " (chatglm train STAGE --help lists them)"


@dataclass
class Settings(DataSettings):
    """What every stage can be told.

    Attributes:
        model: folder of the model to start from; "" is this repository.
        verify: compare the model's files with its SHA256SUMS before anything is read.
        output: folder of everything that is written.
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
        lora_targets: the layers that get one; "all" is every linear layer of the blocks.
        modules_to_save: modules that are trained whole beside the adapters, and saved with them:
            word_embeddings, lm_head, norms.
        use_dora: learn the length of each row of a matrix apart from its direction (DoRA).
        use_rslora: divide by the root of the rank, and not by the rank (rsLoRA).
        init_lora_weights: how adapters begin, as in peft: true or "gaussian".
        lora_bias: "none", "all" or "lora_only", as in peft.
        adapter: folders of LoRA adapters, in order: the last one goes on being trained, or with
            `lora_rank` a new one on top; those before it are merged into the frozen base.
        any_base: take adapters that were trained on another base.
        sample_prompts: questions that are answered during the training, to be read.
        sample_steps: how often; 0 is with every evaluation.
        early_stopping_patience: evaluations without a better figure (`metric_for_best_model`, the
            loss by default) after which the training ends; 0 for none. The best model is written.
        early_stopping_threshold: by how much a figure must be better to count as such.
    """

    model: str = ""
    verify: bool = False
    output: str = ""
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
    modules_to_save: list[str] = field(default_factory=list)
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: Any = True
    lora_bias: str = "none"
    adapter: list[str] = field(default_factory=list)
    any_base: bool = False
    sample_prompts: list[str] = field(default_factory=list)
    sample_steps: int = 0
    early_stopping_patience: int = 0
    early_stopping_threshold: float = 0.0

    def __post_init__(self) -> None:
        given: Any = self.adapter  # a single one, or "" for none, as it was written before
        self.adapter = [path for path in ([given] if isinstance(given, str) else given) if path]

    def check(self) -> None:
        """Refuse values that no stage can work with.

        Raises:
            KeyProblem: naming the key, the value, and what is possible.
        """
        self.check_data()
        require(self.long_rows in LONG_ROWS, "long_rows", self.long_rows, either(LONG_ROWS))
        require(self.dtype in DTYPES, "dtype", self.dtype, either(DTYPES))
        require(self.bits in (0, 4, 8), "bits", self.bits, "0, 4 or 8")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "0 or more")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "in [0, 1)")
        require(self.max_length >= 0, "max_length", self.max_length, "0 or more")
        if name_stage(self) in ("pretrain", "reward", "ppo", "dpo", "grpo"):
            wanted = "left out: this stage does not learn the answers of dialogues one by one"
            require(not self.learn_turns, "learn_turns", self.learn_turns, wanted)
        if name_stage(self) == "pretrain":
            wanted = "left out: plain texts have no system text"
            require(not self.default_system, "default_system", self.default_system, wanted)
        require(bool(self.output), "output", self.output, "a folder to write to")
        for key in ("early_stopping_patience", "early_stopping_threshold"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        self._check_adapters()

    def _check_adapters(self) -> None:
        """Refuse keys of adapters that contradict one another, or would do nothing."""
        try:
            targets = expand_targets(self.lora_targets)
            modules = expand_modules(self.modules_to_save, targets, self.bits)
        except ValueError as problem:
            raise KeyProblem(str(problem)) from problem
        wanted = {"use_dora": self.use_dora, "use_rslora": self.use_rslora}
        for key, value in (wanted | {"modules_to_save": modules}).items():
            if value and not self.uses_lora:
                raise KeyProblem(f"{key} belongs to adapters: set lora_rank, or leave it out")
        if self.use_dora and self.bits:
            raise KeyProblem(
                f"use_dora needs the length of each row of the weights, which bits={self.bits} "
                "packs: set bits to 0, or leave use_dora out"
            )
        require(
            self.init_lora_weights in ADAPTER_STARTS,
            "init_lora_weights",
            self.init_lora_weights,
            "true or gaussian: others change the base too (pissa, olora, corda, loftq), which the "
            "saved adapters would then need in place of it, or begin with noise",
        )

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are trained instead of the model."""
        return bool(self.lora_rank or self.adapter)

    @property
    def goes_on(self) -> bool:
        """Whether the last of the adapters is trained further, and no new one."""
        return bool(self.adapter) and not self.lora_rank


@dataclass
class RowSettings(Settings):
    """What stages that learn from rows of files can be told beside.

    Attributes:
        group_by_length: make batches of rows of like length, which wastes less on padding.
    """

    group_by_length: bool = False


S = TypeVar("S", bound=Settings)


def read_settings(
    settings_class: type[S],
    library: type | Mapping[str, LibraryKey],
    words: Sequence[str],
    say: Callable[[str], None] = lambda line: None,
    find_owners: Callable[[str], Sequence[str]] = lambda key: (),
) -> tuple[S, dict[str, Any]]:
    """Read a stage's settings from the command line and the file that `--config` names.

    Names of other programs are understood (`keys.names`).

    Args:
        settings_class: of the stage.
        library: the dataclass of the library's own arguments, or what its fields are.
        words: as typed: `--config FILE --learning_rate 1e-4 --train_data a.jsonl b.jsonl`; flags
            win over the file. A flag without a value is true.
        say: is told what names of other programs were taken for.
        find_owners: names the stages that have a key which this one has not.

    Returns:
        The settings, checked, and the keys that go to the library.

    Raises:
        KeyProblem: for keys that there are not, and values that they cannot have; all of them.
    """
    theirs = list_fields(library) if isinstance(library, type) else library
    own = get_type_hints(settings_class)
    given = _read_given(words, name_stage(settings_class), own, theirs)
    unknown = [key for key in given.values if key not in own and key not in theirs]
    told = [
        _describe_unknown(k, given.places.get(k, ""), [*own, *theirs], find_owners(k))
        for k in unknown
    ]
    problems = [" ".join(told).rstrip(";") + LISTED] if unknown else []
    problems += given.problems
    fields, arguments, wrong = _sort_values(given, own, theirs)
    problems += wrong.values()
    settings = settings_class(**fields)
    found: list[str] = []
    with collect_problems(found):
        settings.check()
    # Of a key whose value is of no use the default was checked, which nobody asked for.
    problems += [text for text in found if text.split(" ")[0] not in wrong]
    refuse_all(problems)
    for line in given.notes:
        say(line)
    return settings, arguments


class Given(NamedTuple):
    """What was typed.

    Attributes:
        values: of the keys.
        places: where keys of a file stand, in words.
        notes: what names of other programs were taken for.
        problems: why some were not.
    """

    values: dict[str, Any]
    places: dict[str, str]
    notes: list[str]
    problems: list[str]


def _read_given(
    words: Sequence[str], stage: str, own: Mapping[str, Any], library: Mapping[str, Any]
) -> Given:
    """Read the command line and its file; flags go before the file, whatever their names."""
    flags = read_flags(words)
    config = flags.pop("config", None)
    lines = {} if config is None else read_lines(Path(str(config)))
    filed = translate({key: value for key, (value, _) in lines.items()}, stage, own, library)
    typed = translate(flags, stage, own, library)
    places = {key: f" ({config}:{lines[filed.origins.get(key, key)][1]})" for key in filed.keys} | {
        key: f" (given as {name})" if (name := typed.origins.get(key, key)) != key else ""
        for key in typed.keys
    }
    values = filed.keys | typed.keys
    problems = [f"{said} (in {config})" for said in filed.problems] + typed.problems
    problems += find_contradictions(values, filed.defaults | typed.defaults)
    defaults, notes = merge_defaults(values, (filed, typed))
    return Given(defaults | values, places, filed.notes + typed.notes + notes, problems)


def _sort_values(
    given: Given, own: Mapping[str, Any], library: Mapping[str, LibraryKey]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return our values and the library's, each of its type, and what is wrong with others."""
    fields: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for key, value in given.values.items():
        try:
            if key in own:
                fields[key] = coerce(key, value, own[key])
            elif key in library:
                arguments[key] = check_kind(key, guess_number(value), library[key].kinds)
        except KeyProblem as problem:
            wrong[key] = f"{problem}{given.places.get(key, '')}"
    return fields, arguments, wrong


def _describe_unknown(key: str, place: str, known: Sequence[str], owners: Sequence[str]) -> str:
    """Say that there is no such key, and the nearest one that there is, or who has it."""
    if owners:
        return f"there is no key {key}{place} here, but in {', '.join(owners)};"
    near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(key, NAMES, n=1)
    return f"there is no key {key}{place}{f'; did you mean {near[0]}?' if near else ';'}"


def name_stage(settings: Settings | type[Settings]) -> str:
    """Return the name of the stage whose settings these are."""
    kind = settings if isinstance(settings, type) else type(settings)
    return kind.__name__.removesuffix("Settings").lower() or "train"


def write_settings(settings: Settings, arguments: Mapping[str, Any], folder: Path) -> None:
    """Keep beside the results what they were made with, as a file for `--config`."""
    import yaml

    content = {**dataclasses.asdict(settings), **arguments}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    write_whole(folder / SETTINGS_FILE, text.encode())


__all__ = [
    "KeyProblem",
    "RowSettings",
    "Settings",
    "coerce",
    "name_stage",
    "read_config",
    "read_flags",
    "read_settings",
    "require",
    "write_settings",
]
