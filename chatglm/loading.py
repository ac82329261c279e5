"""Owns the way from a model folder to a model that is ready to answer.

Checks what a user can get wrong before any weight is read, chooses the device and the number
format, quantizes when asked. Does not know the model's classes: they come through `AutoModel` and
`AutoTokenizer`, by the door that is chosen (`door`): the installed ones, or those of the folder.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from chatglm import door, model
from chatglm.adapters.acting import prefix_fields, put_on
from chatglm.adapters.kinds import Stack
from chatglm.checking.quick import require_model, require_text
from chatglm.checkpoints.checksums import verify_folder
from chatglm.checkpoints.place import find_folder
from chatglm.checkpoints.reading import list_weight_files
from chatglm.checkpoints.recognize import CONFIG_FILE, read_object

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    path: str | Path,
    bits: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    verify: bool = False,
    adapters: Stack | None = None,
) -> tuple[Any, Any]:
    """Load the model and the tokenizer of a folder, in evaluation mode.

    Args:
        path: a model folder (config.json, the vocabulary, the weights).
        bits: 4 or 8 to quantize the blocks' matrices, None to leave the weights as they are.
        device: "cpu", "cuda", "cuda:1", "mps"; the best one of this machine if None.
        dtype: "float32", "float16" or "bfloat16", or the torch dtype of that name; float16 if
            None, but float32 for plain weights on a CPU.
        verify: compare the folder's files with its SHA256SUMS first, which reads all of them; by
            default that file is not looked at.
        adapters: that are to act on it (`chatglm.adapters.kinds.stack_adapters`), or None.

    Returns:
        The model, on its device, and its tokenizer.

    Raises:
        ValueError: for a wrong argument, an incomplete folder, weights that are not those of the
            folder's config.json, or files that are not as their hashes say; the message names the
            value and the remedy.
    """
    if bits not in (None, 4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    target = choose_device(device)
    final_dtype = choose_dtype(dtype, target)
    folder = check_model_folder(path, verify)
    if not door.runs_folder_code():
        require_text(folder)
    if dtype is None and (bits or is_packed(folder)):
        final_dtype = torch.float16  # what is not packed, the head above all, in half the size
    tokenizer = door.load_from(folder, AutoTokenizer)
    try:
        fields = prefix_fields(adapters) if adapters else {}
        loaded = _read_model(folder, target, final_dtype, bits, **fields)
        return (put_on(loaded, adapters) if adapters else loaded).eval(), tokenizer
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{folder} does not fit into the memory of {target} (bits={bits}, {final_dtype}): "
            "use 8 or 4 bits, or the device cpu"
        ) from error


def default_model_folder() -> Path:
    """The repository this package runs from, else the current folder.

    Raises:
        ValueError: if neither is a model folder.
    """
    for folder in (model.FOLDER, Path.cwd()):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"no model is named, and {Path.cwd()} is no model folder: name one, `chatglm chat FOLDER`; "
        "a clone of the repository has a small one in it"
    )


def check_model_folder(path: str | Path, verify: bool = False) -> Path:
    """Resolve a model folder whose configuration and weight files are all there.

    Args:
        path: the folder.
        verify: compare its files with its SHA256SUMS too.

    Raises:
        ValueError: if it does not exist, is not of this family or not whole (`checking.quick`), or
            if a file is not as its hash says.
    """
    folder = find_folder(path)
    require_model(folder)
    if verify:
        verify_folder(folder, list_weight_files(folder))
    return folder


def choose_device(device: str | None) -> torch.device:
    """The device of that name, or the best one of this machine.

    Raises:
        ValueError: if there is no such device here.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *available]
    if device is not None and device not in available:
        raise ValueError(f"device must be one of {', '.join(available)} here, got {device}")
    return torch.device(device or available[0])


def is_packed(folder: Path) -> bool:
    """Whether the weights of a folder are stored quantized."""
    return bool(read_object(folder / CONFIG_FILE).get("quantization_bit"))


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format of that name, or the one that suits the device and plain weights.

    Raises:
        ValueError: if the name is none of `DTYPES`.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return DTYPES[name]


def _read_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    bits: int | None = None,
    **fields: Any,
) -> Any:
    """Read the weights straight to a device; fields are of the configuration."""
    options: dict[str, Any] = dict(fields)
    if bits is not None:  # each matrix is packed as it is read; it is never whole on the device
        options["quantization_config"] = {"quant_method": "chatglm", "bits": bits}
    return door.load_from(folder, AutoModel, dtype=dtype, device_map={"": device}, **options)
