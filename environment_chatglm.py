"""What is installed around the model: the release of transformers, and the engine for a CPU.

Owns the list of tested releases, the check of the installed one, and each name or calling
convention that changed from one of them to the next. Apart from that check nothing asks for a
version number: what an object looks like decides, so that a release that is not out yet is met by
the same code.

Owns the seam to the engine too, and what graphs hold in the place of kernels. The model's files are
complete without an engine: each function that it has a fast twin of is the slow one, and answers
wherever the twin does not, which for operands that it does not take returns None. The engine is the
package `chatglm.cpu`; another version of the seam is left alone, with a line in the log.

Knows nothing of checkpoints, or of what the model or its engine computes. `docs/hooks.md` lists
what else the model's files lean on, and the test that names each of it.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from packaging import version
from torch import Tensor, nn
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

ENGINE = "chatglm.cpu"
SEAM_VERSION = 1
OPERATORS = "chatglm"  # where torch keeps the operations that graphs see
# The first is for all devices; the second is what the CPU's alone was called before.
SWITCH_VARIABLES = ("CHATGLM_KERNELS", "CHATGLM_CPU_KERNELS")

# The methods of peft that compute with the weight of the layer that an adapter is around. Those of
# DoRA and PiSSA, and others that make an adapter from it, end as the last one does.
WEIGHT_READERS = ("merge", "_merge", "get_base_weight", "init")

# Whether the `from_pretrained` that runs in this thread was told no dtype of the caller's.
IS_PLAIN_LOAD = contextvars.ContextVar("IS_PLAIN_LOAD", default=False)

logger = logging.get_logger(__name__)

_switched_off: list[object] = []  # by whom, in any thread


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


def refuse_weight_of_integers(layer: nn.Module) -> None:
    """Refuse an adapter of peft that is about to compute with a packed layer's weight.

    Its `get_base_layer` asks every layer for a `base_layer` within, and calls nothing else of ours
    before it reads the weight; which method wants it only the next frame tells. Left alone, some
    methods end in torch's errors of shapes or dtypes, and others change the integers in silence.

    Args:
        layer: that was asked.

    Raises:
        ValueError: if it is for one of `WEIGHT_READERS`.
    """
    names: list[str] = []
    frame = inspect.currentframe()
    while frame is not None and len(names) < 4:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    asked_by, reader = (*names, "", "")[2:4]  # behind this function and the layer's property
    if asked_by == "get_base_layer" and (reader in WEIGHT_READERS or reader.endswith("_init")):
        raise ValueError(
            f"This adapter needs the weight of {layer}, which is packed integers, to be merged or "
            "to be made from it (as DoRA and PiSSA are): unpack the model first, by "
            "model.get_base_model().dequantize(), or use the unquantized weights (chatglm merge "
            "FOLDER TARGET --lora ADAPTER, and chatglm quantize behind it)."
        )


@contextlib.contextmanager
def loading_own_dtype(options: dict[str, Any]) -> Iterator[None]:
    """Ask for the dtype of config.json where none is named: transformers 4 takes float32 else.

    Meanwhile `IS_PLAIN_LOAD` says whether it is the configuration's, and not one of the caller's.

    Args:
        options: keyword arguments of `from_pretrained`.
    """
    named = [options[key] for key in ("dtype", "torch_dtype") if options.get(key) is not None]
    if not named:
        options["dtype"] = "auto"
    token = IS_PLAIN_LOAD.set(all(isinstance(x, str) and x == "auto" for x in named))
    try:
        yield
    finally:
        IS_PLAIN_LOAD.reset(token)


def keep_float_norms(parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Widen a model's norms where a checkpoint has float32, unless the caller named a dtype.

    Args:
        parameters: of the model, by name; those of norms have no values yet.
        stored: tensors of the checkpoint, by the same names.
    """
    for name, tensor in stored.items():
        parameter = parameters[name]
        is_wide = "layernorm" in name and tensor.dtype == torch.float32
        if is_wide and parameter.is_meta and IS_PLAIN_LOAD.get():
            parameter.data = parameter.data.float()


def check_dtype_name(name: Any) -> None:
    """Raise ValueError for the name of a number format that torch does not have."""
    is_known = isinstance(getattr(torch, str(name).removeprefix("torch."), None), torch.dtype)
    if name not in (None, "auto") and not is_known:
        raise ValueError(
            f"config.json has the dtype {name!r}, and it must be one of torch's: float32, float16 "
            "or bfloat16."
        )


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


# The seam


@contextlib.contextmanager
def kernels_off() -> Iterator[None]:
    """Leave everything to plain torch meanwhile, in all threads.

    The environment variable `CHATGLM_KERNELS=off` does so for a whole process.
    """
    _switched_off.append(marker := object())
    try:
        yield
    finally:
        _switched_off.remove(marker)


def are_kernels_on() -> bool:
    """Say whether the user leaves kernels switched on."""
    return not _switched_off and not any(os.environ.get(v) == "off" for v in SWITCH_VARIABLES)


def may_use_kernels() -> bool:
    """Say whether code of our own may compute; a compiler or a tracer has to see torch's."""
    is_tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return not torch.compiler.is_compiling() and not is_tracing and are_kernels_on()


@functools.cache
def find_engine() -> Any:
    """Return the engine's package; None, with one line in the log, where there is none that fits.

    Raises nothing: whatever keeps a package from being imported, the model's files need none.
    """
    try:
        engine = importlib.import_module(ENGINE)
    except ImportError as error:
        problem = f"{ENGINE} cannot be imported ({error})"
    else:
        version_found = getattr(engine, "SEAM_VERSION", None)
        if version_found == SEAM_VERSION:
            return engine
        problem = f"{ENGINE} has version {version_found} of the seam, not {SEAM_VERSION}"
    logger.warning_once(
        f"ChatGLM's kernels for CPUs are not used, torch's slower operations are: {problem}. "
        "`pip install -U chatglm` brings the package that fits."
    )
    return None


def find_twin(name: str) -> Callable[..., Any] | None:
    """Return the engine's function of a name, or None where plain torch has to do."""
    engine = find_engine() if may_use_kernels() else None
    return None if engine is None else getattr(engine, name)


def try_first(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let the engine's function of that name answer first; what it does not take, it leaves.

    The decorated function is the model; its twin takes the same arguments, those on a CPU.
    """

    def plug(slow: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(slow)
        def choose(*args: Any, **kwargs: Any) -> Any:
            is_for_engine = any(isinstance(x, Tensor) and x.is_cpu for x in args)
            twin = find_twin(name) if is_for_engine else None
            found = None if twin is None else twin(*args, **kwargs)
            return slow(*args, **kwargs) if found is None else found

        return choose

    return plug


def with_fast_products(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Have the engine compute what torch's linear layers are slow at on a CPU, without gradients.

    It sees every call of `torch.nn.functional.linear` meanwhile, so that the layers are torch's own
    and other tools know them.
    """

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_for_engine = not torch.is_grad_enabled() and self.device.type == "cpu"
        twin = find_twin("fast_products") if is_for_engine else None
        if twin is None:
            return forward(self, *args, **kwargs)
        with twin():
            return forward(self, *args, **kwargs)

    return run


# What graphs hold


def keep_whole(
    name: str, allocate: Callable[..., Tensor], has_kernels: Callable[[torch.device], bool]
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Let graphs call the decorated function, where it has kernels, and not look into it.

    What `torch.compile` and `torch.export` make then holds `torch.ops.chatglm.<name>`, which
    computes what the function does, and by its kernels, whenever the graph is run.

    Args:
        name: of the operation.
        allocate: takes the same arguments, and returns memory as the result's.
        has_kernels: tells it of a device, with a compiler's leave to ask.
    """

    def plug(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        operator = _define_operator(name, compute, allocate)

        @functools.wraps(compute)
        def choose(input: Tensor, *args: Any) -> Tensor:
            # Outside of graphs the operation costs 10 to 25 us more than the call (1,000 small
            # products on a CPU, torch 2.13): 1 to 3 ms a token of 6B, so the call is direct there.
            is_kept = torch.compiler.is_compiling() and are_kernels_on()
            if is_kept and has_kernels(input.device) and not _is_autocast(input):
                return operator(input, *args)
            return compute(input, *args)

        return choose

    return plug


def _define_operator(
    name: str, compute: Callable[..., Tensor], allocate: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Have torch know a function by a name, and return the operation.

    A process may hold several copies of these files, and torch takes a name once: the first copy
    computes for all. So a name's meaning never changes; another meaning gets another name.
    """
    known = getattr(torch.ops, OPERATORS)
    if not hasattr(known, name):
        operator = torch.library.custom_op(f"{OPERATORS}::{name}", compute, mutates_args=())
        operator.register_fake(allocate)
    return getattr(known, name)


def _is_autocast(tensor: Tensor) -> bool:
    """Tell whether torch casts products of a tensor, by rules that are not an operation's."""
    return torch.is_autocast_enabled(tensor.device.type)


__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "TESTED_TRANSFORMERS",
    "change_load_settings",
    "check_dtype_name",
    "check_transformers",
    "choose_cache",
    "find_engine",
    "find_twin",
    "keep_float_norms",
    "keep_whole",
    "kernels_off",
    "loading_own_dtype",
    "may_use_kernels",
    "read_load_settings",
    "refuse_weight_of_integers",
    "rename_cache",
    "renew_ties",
    "try_first",
    "with_fast_products",
]
