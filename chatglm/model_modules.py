"""Owns finding the modules that a model came from: a process may hold several copies of its files.

transformers gives the files of each folder, and from 5.24 on of each class that is asked for, a
package of their own. What one copy makes, another does not know.
"""

import importlib
from types import ModuleType

from torch import nn

MODEL_MODULE = "modeling_chatglm"


def import_model_module(model: nn.Module, name: str) -> ModuleType:
    """Return a module of the copy that a model's class is in.

    Args:
        model: of the family, perhaps in wrappers as those of adapters.
        name: of a file of the model, without its folder and ending, as "decoding_chatglm".

    Raises:
        ValueError: if there is no model of the family in it.
    """
    for module in model.modules():
        package, _, own = type(module).__module__.rpartition(".")
        if own == MODEL_MODULE:
            return importlib.import_module(f"{package}.{name}")
    raise ValueError(
        f"{type(model).__name__} holds no class of {MODEL_MODULE}.py: load the model with this "
        "package or with trust_remote_code=True"
    )


__all__ = ["import_model_module"]
