"""The model files as a package: `chatglm.model.modeling_chatglm` and its neighbours.

In a clone they lie at the top of the repository, in an installed package in the folder `model`
beside this file: wherever they are, they are the same files and there is one copy. Does not know
which files there are.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "model"

FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent

__path__ = [str(FOLDER)]
