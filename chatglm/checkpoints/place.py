"""Owns what a person names in the place of a folder: a file, a name on the Hub, nothing at all.

Does not know what a folder holds.
"""

import re
from pathlib import Path

from chatglm.checkpoints.recognize import CONFIG_FILE
from chatglm.checkpoints.signatures import ARCHIVE, GGML, GGUF, LEGACY, SAFETENSORS, identify_file

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEIGHTS = {ARCHIVE, LEGACY, SAFETENSORS}


def find_folder(path: str | Path) -> Path:
    """Return a folder on this machine by its full path.

    Raises:
        ValueError: if it is none, saying what it is instead.
    """
    try:
        folder = Path(path).expanduser().resolve()
    except RuntimeError as error:  # nobody's home is known by that name
        raise ValueError(f"{path} is no folder: {error} Write its whole path") from error
    if _is_undecodable(str(folder)):
        raise ValueError(
            f"{path} is no UTF-8 text, and the libraries that read weights take no other names: "
            "rename the folder"
        )
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"{path} is no folder but {_describe_file(folder)}")
    if HUB_NAME.fullmatch(str(path)) and not folder.parent.is_dir():
        raise ValueError(
            f"{path} is no folder, but may be a name on the Hub: download it (hf download {path} "
            "--local-dir FOLDER) and name that folder"
        )
    raise ValueError(f"{path} is no folder: name a model folder on this machine")


def _is_undecodable(text: str) -> bool:
    """Whether a path holds bytes that are no text; Python hands these on as lone surrogates."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _describe_file(file: Path) -> str:
    kind = identify_file(file)
    if kind in (GGUF, GGML):
        return f"{kind}: name the folder of the weights that it was made from"
    what = "a weight file" if kind in WEIGHTS else "a file"
    beside = "" if (file.parent / CONFIG_FILE).is_file() else f", with {CONFIG_FILE} in it"
    return f"{what}: name the folder that it lies in{beside}"


__all__ = ["find_folder"]
