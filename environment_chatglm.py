"""What is installed around the model: the release of transformers, and the engine for a CPU.

Owns the list of tested releases, the check of the installed one, each name or calling convention
that changed from one of them to the next, and by which keywords scripts of 2023 ask for what. Apart
from that check nothing asks for a version number: what an object looks like decides, so that a
release that is not out yet is met by the same code.

Owns the seam to the engine too, and what graphs hold in the place of kernels. The model's files are
complete without an engine: each function that it has a fast twin of is the slow one, and answers
wherever the twin does not, which for operands that it does not take returns None. The engine is the
package `chatglm.cpu`; another version of the seam is left alone, with a line in the log.

Knows nothing of checkpoints, or of what the model or its engine computes. `docs/hooks.md` lists
what else the model's files lean on, and the test that names each of it.
"""

import contextlib
import contextvars
import copy
import dataclasses
import functools
import importlib
import inspect
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from packaging import version
from torch import Tensor, nn
from transformers import PretrainedConfig, TextStreamer
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

# Options of `quantize` for the original's own kernels; none changes a number.
KERNEL_OPTIONS = (
    "compile_parallel_kernel",
    "kernel_file",
    "parallel_num",
    "source_code",
    "use_quantization_cache",
)
# What options of bitsandbytes begin with, beside `load_in_8bit` and `load_in_4bit` themselves.
BITSANDBYTES_OPTIONS = ("load_in_8bit_", "llm_int8_", "bnb_4bit_")

# A graph of torch 2.6 or 2.9 takes a parameter without the attributes that it has, and one of 2.6
# takes a property for the dictionary that it stands for. 2.10 to 2.12 were not tried.
GRAPHS_SEE_ATTRIBUTES = version.parse(torch.__version__).release >= (2, 13)

ENGINE = "chatglm.cpu"
SEAM_VERSION = 1
OPERATORS = "chatglm"  # where torch keeps the operations that graphs see
# The first is for all devices; the second is what the CPU's alone was called before.
SWITCH_VARIABLES = ("CHATGLM_KERNELS", "CHATGLM_CPU_KERNELS")

# The methods of peft that compute with the weight of the layer that an adapter is around. Those of
# DoRA and PiSSA, and others that make an adapter from it, end as the last one does.
WEIGHT_READERS = ("merge", "_merge", "get_base_weight", "forward", "init")
# The modules of adapters that compute with it in more places, and of those that need its shape.
WEIGHT_TUNERS = re.compile(r"\.(adamss|deft|delora|frod|hira|hra|osf|peanut|supertuning)\.")
SHAPE_TUNERS = re.compile(r"\.(loha|lokr)\.")

# Whether the `from_pretrained` that runs in this thread was told no dtype of the caller's.
IS_PLAIN_LOAD = contextvars.ContextVar("IS_PLAIN_LOAD", default=False)

# What transformers' clean_up_tokenization takes spaces from, in three turns: it goes mark by mark,
# but those of one turn neither overlap nor make one another, and may as well be replaced at once.
CLEANED = ((" .", " ?", " !", " ,"), (" ' ",), (" n't", " 'm", " 's", " 've", " 're"))

logger = logging.get_logger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])

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


def is_streaming() -> bool:
    """Whether the method that asks was called by a streamer of transformers that may go on.

    A streamer shows what its growing list of tokens decodes to, less what it has shown, and asks
    once more at the end. What is taken back between is lost.
    """
    frame = inspect.currentframe()
    caller = frame and frame.f_back and frame.f_back.f_back
    return caller is not None and caller.f_code is TextStreamer.put.__code__


def find_settled(text: str, cleans_up: bool) -> str:
    """Return what a streamer may show of a text: the part that stays however the text goes on.

    Each turn of cleaning up holds back the beginning of a mark at the end of what the turn before
    let through. Half a character may be a whole one, and at a line break at the end a streamer
    would forget its tokens, and the space of the next one with them.

    Args:
        text: what the tokens so far decode to, not cleaned up.
        cleans_up: whether it is to be.
    """
    for marks in CLEANED if cleans_up else ():
        pattern = "|".join(map(re.escape, marks))
        rest = re.split(pattern, text)[-1]  # what is replaced begins no other mark of its turn
        held = max(n for mark in marks for n in range(len(mark)) if rest.endswith(mark[:n]))
        text = re.sub(pattern, lambda mark: mark[0].strip(), text[: len(text) - held])
    return text.rstrip("\n\ufffd")


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
    module, frame = "", inspect.currentframe()
    while frame is not None and len(names) < 4:
        names.append(frame.f_code.co_name)
        module = frame.f_globals.get("__name__", "")
        frame = frame.f_back
    asked_by, reader = (*names, "", "")[2:4]  # behind this function and the layer's property
    reads = reader in WEIGHT_READERS or reader.endswith("_init") or WEIGHT_TUNERS.search(module)
    if asked_by == "get_base_layer" and (reads or _has_other_shape(layer, module)):
        raise ValueError(
            f"This adapter needs the weight of {layer}, which is packed integers, to be merged, to "
            "be made from it (as DoRA and PiSSA are) or to compute with it (as HRA does): unpack "
            "the model first, by model.get_base_model().dequantize(), or use the unquantized "
            "weights (chatglm merge FOLDER TARGET --lora ADAPTER, and chatglm quantize behind it)."
        )


def find_input_device(model: Any) -> Any:
    """Return the device that ids belong on: the model's, or the one an offloaded embedding uses.

    Weights that accelerate has laid down elsewhere are on the device "meta", where nothing is
    computed; its hooks fetch them to where it is.
    """
    for module in model.get_input_embeddings().modules():  # an adapter may be around it
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if getattr(part, "execution_device", None) is not None:
                return part.execution_device
    return model.device


class AdaptedMethod:
    """A method that runs on the model of peft that it is asked of, if the adapter acts only there.

    peft hands out methods of the model within as they are. That is right for LoRA and all others
    that change layers; but what is learned in place of a prompt (prompt tuning, P-tuning, prefix
    tuning) is put in by the `generate` of peft's own model, which the model within does not know.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self.function
        return types.MethodType(self.function, _find_adapted_model(model))


class ReturningMethod(AdaptedMethod):
    """A method of the model within that returns it: asked of a model of peft, it returns that."""

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self.function
        adapted = _find_adapted_model(model, must_act=False)

        @functools.wraps(self.function)
        def run(*args: Any, **kwargs: Any) -> Any:
            found = self.function(model, *args, **kwargs)
            return adapted if found is model else found

        return types.MethodType(self.function, model) if adapted is model else run


def returns_with_adapters(function: Method) -> Method:
    """Mark a method that returns its model: what is learned in place of a prompt is not lost."""
    return cast(Method, ReturningMethod(function))


def acts_with_adapters(function: Method) -> Method:
    """Mark a method that generates: on a model of peft it is to act through the adapter."""
    return cast(Method, AdaptedMethod(function))


def _find_adapted_model(model: Any, must_act: bool = True) -> Any:
    """Return the model of peft that has just been asked for a method of `model`, if it is to run.

    Raises:
        ValueError: if its adapter was made for a task in which it does not act here.
    """
    frame = inspect.currentframe()
    frame = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    while frame is not None and frame.f_code.co_name == "__getattr__":
        asked = frame.f_locals.get("self")
        config = find_learned_prompt(asked)
        if config is not None:
            task = getattr(config.task_type, "value", config.task_type)
            if must_act and task != "CAUSAL_LM":
                raise ValueError(
                    f"An adapter of {config.peft_type} with task_type {task!r} would not act here: "
                    'make it with task_type="CAUSAL_LM", or say so in its adapter_config.json.'
                )
            return asked
        frame = frame.f_back
    return model


def find_learned_prompt(model: Any) -> Any:
    """Return peft's configuration of what is learned in place of a prompt; None of other models."""
    config = getattr(model, "active_peft_config", None)
    return config if getattr(config, "is_prompt_learning", False) else None


def _has_other_shape(layer: Any, module: str) -> bool:
    """Tell whether an adapter of a module of peft is wrong about the columns of a layer."""
    return bool(SHAPE_TUNERS.search(module)) and layer.weight.shape[-1] != layer.in_features


def refuse_embedded_prompt(model: Any) -> None:
    """Raise ValueError for a model of peft whose adapter stands before the prompt as embeddings.

    Its forward hands on no ids, so that nothing tells where a prompt ends: scores would be wrong.
    """
    config = find_learned_prompt(model)
    kind = None if config is None else getattr(config.peft_type, "value", config.peft_type)
    if kind not in (None, "PREFIX_TUNING"):
        raise ValueError(
            f"Answers cannot be scored through an adapter of {kind}, which stands before the "
            "prompt as embeddings: use chat or generate, or prefix tuning or LoRA."
        )


def read_quantize_options(embeddings: bool, options: dict[str, Any]) -> bool:
    """Return whether `quantize` is to pack the embedding too, by the original's name or by ours.

    Args:
        embeddings: by ours.
        options: keywords that are not ours.

    Raises:
        ValueError: for a keyword that the original did not have either.
    """
    unknown = set(options) - {"quantize_embeddings", *KERNEL_OPTIONS}
    if unknown:
        raise ValueError(
            f"quantize() has no option {', '.join(sorted(unknown))}: it takes bits, empty_init, "
            "group_size, embeddings and activations. A model is moved by .cuda() or .to()."
        )
    ignored = sorted(set(options) & {*KERNEL_OPTIONS})
    if ignored:
        logger.warning("quantize() ignores %s.", ", ".join(ignored))
    return embeddings or bool(options.get("quantize_embeddings"))


def translate_load_options(options: dict[str, Any]) -> dict[str, Any] | None:
    """Replace keywords of `from_pretrained` that the original or transformers 4 had.

    Args:
        options: what the caller passed; changed in place.

    Returns:
        `bits` and `embeddings` of the format that `load_in_4bit` or `load_in_8bit` asks for, or
        None.

    Raises:
        ValueError: for keywords that ask for two formats, or for bitsandbytes.
    """
    for name in ("empty_init", "resume_download"):  # neither changes what is loaded
        options.pop(name, None)
    for name in ("from_tf", "from_flax"):
        if options.pop(name, None):
            raise ValueError(f"{name}=True: ChatGLM's weights are PyTorch's, leave {name} out.")
    token = options.pop("use_auth_token", None)
    if token is not None:
        options.setdefault("token", token)
    bits = _read_load_bits(options)
    embeddings = options.pop("quantize_embeddings", None)
    if bits:
        return {"bits": bits, "embeddings": bool(embeddings)}
    if embeddings is not None:
        _ask_for_embeddings(bool(embeddings), options)
    return None


def _read_load_bits(options: dict[str, Any]) -> int:
    """Take `load_in_4bit` and `load_in_8bit` out of the options of a load."""
    asked = [bits for bits in (4, 8) if options.pop(f"load_in_{bits}bit", None)]
    foreign = [name for name in options if name.startswith(BITSANDBYTES_OPTIONS)]
    others = [n for n in ("quantization_config", "quantization_bit") if asked and options.get(n)]
    given = [*(f"load_in_{bits}bit" for bits in asked), *others]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)}: options of bitsandbytes go into "
            "quantization_config=BitsAndBytesConfig(...); without them load_in_8bit and "
            "load_in_4bit ask for ChatGLM's own packed weights."
        )
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} ask for two formats of the weights: pass one.")
    if not asked:
        return 0
    logger.warning_once(
        f"{given[0]}=True packs the weights into ChatGLM's own {asked[0]} bits, as quantize("
        f"{asked[0]}) does. For those of bitsandbytes pass quantization_config="
        f"BitsAndBytesConfig({given[0]}=True)."
    )
    return asked[0]


def _ask_for_embeddings(embeddings: bool, options: dict[str, Any]) -> None:
    """Pass on the original's `quantize_embeddings` where a configuration is read or was given."""
    config = options.get("config")
    if not isinstance(config, PretrainedConfig):
        options["quantization_embeddings"] = embeddings
        return
    if embeddings and not cast(Any, config).quantization_bit:
        raise ValueError(
            "quantize_embeddings=True without bits packs nothing: pass quantization_bit=4 or 8."
        )
    options["config"] = config = copy.deepcopy(config)
    cast(Any, config).quantization_embeddings = embeddings


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
    "acts_with_adapters",
    "change_load_settings",
    "check_dtype_name",
    "check_transformers",
    "choose_cache",
    "find_engine",
    "find_input_device",
    "find_learned_prompt",
    "find_twin",
    "keep_float_norms",
    "keep_whole",
    "kernels_off",
    "loading_own_dtype",
    "may_use_kernels",
    "read_load_settings",
    "read_quantize_options",
    "refuse_embedded_prompt",
    "refuse_weight_of_integers",
    "rename_cache",
    "renew_ties",
    "returns_with_adapters",
    "translate_load_options",
    "try_first",
    "with_fast_products",
]
