"""Owns the model card, README.md, of a folder that a command writes: its form, and its licence.

A command tells in rows what it made and how; the licence and the name on the Hub come from the
folder that it started from. Does not know what a command computes. No path of a machine gets into a
card.
"""

import datetime
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

CARD_FILE = "README.md"
BASE_CARD_FILE = "README.base.md"  # the card of the folder that a converted one was made from
LICENSE_FILES = ("MODEL_LICENSE", "LICENSE")
MARK = "<!-- Written by chatglm. Remove this line, and no command writes over this card. -->"
# What peft, trl and transformers leave, each under this file's name.
FOREIGN_MARKS = ("# Model Card for ", "generated_from_trainer")
LICENSE_FIELDS = ("license", "license_name", "license_link")
OFFICIAL_VOCABULARIES = (130528, 150528)
OFFICIAL_NAME = re.compile(r"(THUDM|zai-org)/chatglm-6b[\w.-]*")
HEAD = re.compile(r"---\n(.*?\n)---(\n|$)", re.DOTALL)
PLACE = re.compile(r"^.*[/\\](?=[^/\\])")

PAGE = """\
---
{head}---
{mark}

# {title}

{summary}

## Precision

{precision}

## How it was made

{making}

## How to load it

From inside this folder; from elsewhere, with its path or its name on the Hub in the place of `"."`:

```python
{loading}
```

`trust_remote_code=True` runs the Python files of the model's folder.

## Licence

{licence}
"""


class Base(NamedTuple):
    """The folder that a result was made from.

    Attributes:
        name: of the folder, without where it is.
        hub_name: of the model on the Hub, or None where the folder does not tell.
        licence: the fields of a card's head that say it.
        has_licence_file: whether MODEL_LICENSE is there, which goes along then.
    """

    name: str
    hub_name: str | None
    licence: dict[str, str]
    has_licence_file: bool


class Card(NamedTuple):
    """What a card says.

    Attributes:
        title: one line.
        summary: what it is, in a sentence or two.
        base: what it was made from.
        precision: rows about number formats.
        making: rows about the command and its settings; date and versions come by themselves.
        loading: two lines of Python and their imports.
        library: that loads it.
        task: the Hub's word for what it does.
        tags: more of them than every ChatGLM has.
    """

    title: str
    summary: str
    base: Base
    precision: Mapping[str, str]
    making: Mapping[str, str]
    loading: str
    library: str = "transformers"
    task: str = "text-generation"
    tags: tuple[str, ...] = ()


def read_base(folder: Path) -> Base:
    """Return what a folder says of itself: by its card, its configuration, its licence file."""
    head = read_head(folder / CARD_FILE)
    config = folder / "config.json"
    fields: dict[str, Any] = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    has_licence_file = (folder / "MODEL_LICENSE").is_file()
    licence = {key: str(head[key]) for key in LICENSE_FIELDS if head.get(key)}
    if not licence:
        is_official = has_licence_file or fields.get("vocab_size") in OFFICIAL_VOCABULARIES
        official = {"license": "other", "license_name": "chatglm-6b-model-license"}
        licence = official if is_official else {"license": "unknown"}
    told = head.get("base_model")
    named = str(fields.get("_name_or_path", ""))
    hub_name = named if OFFICIAL_NAME.fullmatch(named) else told if isinstance(told, str) else None
    return Base(folder.resolve().name, hub_name, licence, has_licence_file)


def read_head(file: Path) -> dict[str, Any]:
    """Return the fields between the two lines of dashes that a card begins with, or none.

    Raises:
        ValueError: if what is there is no YAML.
    """
    import yaml

    found = HEAD.match(file.read_text(encoding="utf-8")) if file.is_file() else None
    try:
        fields: Any = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the head of {file} is no YAML: {reason}") from error
    return cast(dict[str, Any], fields) if isinstance(fields, dict) else {}


def format_card(card: Card) -> str:
    """Return the text of a card, of today."""
    import yaml

    head: dict[str, Any] = {**card.base.licence, "language": ["zh", "en"]}
    if card.base.hub_name:
        head["base_model"] = card.base.hub_name
    head |= {"library_name": card.library, "pipeline_tag": card.task}
    head["tags"] = ["glm", "chatglm", *card.tags]
    making = {**card.making, "date": datetime.date.today().isoformat(), "versions": _versions()}
    return PAGE.format(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        mark=MARK,
        title=card.title,
        summary=card.summary,
        precision=_format_rows(card.precision),
        making=_format_rows({"base model": _name_base(card.base), **making}),
        loading=card.loading,
        licence=_describe_licence(card.base),
    )


def _name_base(base: Base) -> str:
    return f"{base.name} ({base.hub_name})" if base.hub_name else base.name


def _versions() -> str:
    import torch
    import transformers

    from chatglm import __version__

    return (
        f"chatglm {__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )


def _format_rows(rows: Mapping[str, str]) -> str:
    """Return a table of two columns whose cells cannot break it."""
    cells = ((name, " ".join(text.split()).replace("|", r"\|")) for name, text in rows.items())
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in cells)])


def _describe_licence(base: Base) -> str:
    """Return the words on the licence; it is that of the weights that this was made from."""
    name = base.licence.get("license_name", base.licence["license"])
    if name == "unknown":
        stated = f"The folder of {base.name} did not say which: find out before you pass this on."
    else:
        stated = f"Of {base.name} it is `{name}`."
    file = " Its text is in [MODEL_LICENSE](MODEL_LICENSE)." if base.has_licence_file else ""
    return (
        "The weights keep the licence of the model that they were made from. "
        f"{stated}{file} The official ChatGLM-6B weights, and all that is made from them, have a "
        "licence of their own, MODEL_LICENSE, whatever the licence of the code is."
    )


def strip_place(value: Any) -> str:
    """Return a setting as text, of a path its last part alone."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(strip_place, cast(list[Any], value)))
    return PLACE.sub("", value.rstrip("/\\")) if isinstance(value, str) else str(value)


def read_own_card(folder: Path) -> str | None:
    """Return the card if a person wrote it or made it their own; None if a program did."""
    file = folder / CARD_FILE
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    return None if any(mark in text for mark in (MARK, *FOREIGN_MARKS)) else text


def write_card(folder: Path, text: str) -> None:
    """Write a card, whatever is there."""
    (folder / CARD_FILE).write_text(text, encoding="utf-8", newline="\n")


def copy_licenses(base: Path, folder: Path) -> None:
    """Copy the licences of a base model into a folder that has none of those names."""
    for name in LICENSE_FILES:
        if (base / name).is_file() and not (folder / name).exists():
            shutil.copy(base / name, folder)
