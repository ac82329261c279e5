"""Makes the flat model files importable as the package `chatglm_6b`, and finds the shared data.

Also builds what tests need a model for: a tiny random one, and a folder of remote code around one.
"""

import atexit
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import forking
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# No test reaches out, and none sees model files or kernels that another run has cached.
os.environ["HF_HUB_OFFLINE"] = "1"
for _variable in ("HF_MODULES_CACHE", "CHATGLM_KERNEL_CACHE"):
    os.environ[_variable] = tempfile.mkdtemp(prefix="chatglm-tests-")
    atexit.register(shutil.rmtree, os.environ[_variable], ignore_errors=True)
for _variable in ("CHATGLM_KERNELS", "CHATGLM_CPU_KERNELS"):
    os.environ.pop(_variable, None)

_spec = ModuleSpec("chatglm_6b", None, is_package=True)
_spec.submodule_search_locations = [str(ROOT)]
sys.modules.setdefault("chatglm_6b", importlib.util.module_from_spec(_spec))
sys.path += [str(ROOT / "tests" / name) for name in ("parity", "package", "training")]

# The sizes and ids of the golden models.
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_layers": 3,
    "num_attention_heads": 4,
    "inner_hidden_size": 256,
    "max_sequence_length": 128,
    "pad_token_id": 3,
    "mask_token_id": 300,
    "gmask_token_id": 301,
    "bos_token_id": 304,
    "eos_token_id": 305,
}
# With the package, or beside the model's files alone (`make alone`).
PRESETS = next(p for p in (ROOT / "chatglm" / "presets", ROOT / "presets") if p.is_dir())
MODEL_FILES = sorted(path.name for path in ROOT.glob("*.py"))
TOKENIZER_FILES = ("ice_text.model", "tokenizer_config.json", "chat_template.jinja")
# What nearly all commands import of the libraries, and takes seconds.
LIBRARIES = (
    "transformers:AutoModelForCausalLM",
    "transformers:AutoTokenizer",
    "transformers:Trainer",
    "matplotlib.pyplot",
)
# A file is run by one process as a whole: with these begun last, the others would wait for it.
LONGEST_FIRST = (
    "training/test_sft.py",
    "training/test_ppo.py",
    "e2e/test_readme.py",
    "e2e/test_training_docs.py",
    "benchmarks/test_bench_generate.py",
    "training/test_dpo.py",
    "training/test_grpo.py",
    "wild/test_adopt_folders.py",
    "wild/test_c08_command_line.py",
    "unit/test_fewer_passes.py",
    "e2e/test_quantize_command.py",
    "cpu/test_linear.py",
    "unit/test_packing.py",
    "e2e/test_cli.py",
    "training/test_distributed.py",
    "contract/test_decoding_steps.py",
    "property/test_tokenizer_property.py",
)
REPO_SIZES = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "inner_hidden_size": 64,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST_FIRST)}
    missing = [str(path) for path in places if not path.is_file()]
    if missing:
        raise pytest.UsageError(f"LONGEST_FIRST in {__file__} names {missing}, which is not there")
    items.sort(key=lambda item: places.get(item.path, len(places)))


def import_from_package(name: str) -> Any:
    """Import a module of the package; skip the test or the file where only the model's files are.

    A package that is there and cannot be imported is an error.
    """
    if importlib.util.find_spec("chatglm") is None:
        pytest.skip(f"needs the package for {name}", allow_module_level=True)
    return importlib.import_module(name)


def build_model(
    name: str = "ChatGLMForConditionalGeneration", seed: int = 0, spread: float = 2, **fields: Any
) -> Any:
    """Build a tiny random model in evaluation mode.

    A seed gives the same weights on every release of transformers. Those of the blocks are `spread`
    times as wide as a new model's, in which a token is so near its residual that it echoes itself.
    """
    import torch
    from chatglm_6b import configuration_chatglm, modeling_chatglm

    config = configuration_chatglm.ChatGLMConfig(**{**TINY, **fields})
    model = getattr(modeling_chatglm, name)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 2:
            deviation = (2 / sum(parameter.shape)) ** 0.5 * (spread if ".layers." in key else 1)
            deviation = 1 if "prefix_encoder" in key else deviation
            parameter.data.normal_(0, deviation, generator=generator)
    return model


@pytest.fixture
def tiny_config() -> Any:
    return build_model().config


@pytest.fixture
def tiny_model() -> Any:
    return build_model()


@pytest.fixture(scope="session")
def tiny_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as users have it: code, vocabulary, configuration and weights. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny_repo") / "chatglm"
    fields = json.loads((ROOT / "config.json").read_text()) | REPO_SIZES
    build_model(**{k: v for k, v in fields.items() if k != "torch_dtype"}).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields | {"torch_dtype": "float32"}))
    for name in (*MODEL_FILES, *TOKENIZER_FILES, "generation_config.json"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="session")
def quick_python() -> Iterator[str]:
    """A Python that runs a command without importing the libraries first: see `forking`."""
    # Libraries that may choose how many threads they want start them while they are imported.
    if not forking.IS_SUPPORTED or os.environ.get("OMP_NUM_THREADS") != "1":
        yield sys.executable
        return
    server = forking.ForkServer(LIBRARIES)
    yield server.executable
    server.close()


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> dict[Path, list[Any]]:
    """Keep what curves would be drawn of, by path: drawing takes longer than a tiny training."""
    kept: dict[Path, list[Any]] = {}
    for module in ("progress", "run_log"):
        name = f"chatglm.training.{module}.draw_curves"
        monkeypatch.setattr(name, lambda history, path: kept.update({path: list(history)}))
    return kept


@pytest.fixture
def without_kernels() -> Iterator[None]:
    """Leave everything to plain torch."""
    from chatglm_6b.environment_chatglm import kernels_off

    with kernels_off():
        yield


def leave_engine_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the model's files without the engine, as where they are alone."""
    from chatglm_6b import environment_chatglm, quantization

    for module in (environment_chatglm, quantization):
        monkeypatch.setattr(module, "find_engine", lambda: None)


def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make CPU kernels be looked for, and compiled or read from the disk, as in a new process."""
    anew: dict[Any, Any] = {}
    for module in [m for name, m in sys.modules.items() if re.match(r"chatglm\.cpu\.\w+$", name)]:
        for name, value in list(vars(module).items()):
            if hasattr(value, "cache_clear"):
                fresh = anew.setdefault(value, functools.cache(value.__wrapped__))
                monkeypatch.setattr(module, name, fresh)


def count_calls(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: Counter[str]
) -> None:
    """Count the calls of a class's method, which goes on to do what it does."""
    method = inspect.getattr_static(owner, name)
    function = getattr(method, "__func__", method)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    is_of_class = isinstance(method, classmethod)
    monkeypatch.setattr(owner, name, classmethod(count) if is_of_class else count)


def pad_rows(rows: list[list[int]], side: str) -> list[list[int]]:
    """Pad rows to two columns more than the longest, on one side or on both in turn."""
    pad, width = TINY["pad_token_id"], max(map(len, rows)) + 2
    padded = []
    for i, row in enumerate(rows):
        missing = width - len(row)
        before = {"left": missing, "right": 0, "both": 1 + i % (missing - 1)}[side]
        padded.append([pad] * before + row + [pad] * (missing - before))
    return padded


def load_as_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run what a folder's card says of loading, from inside of it; return the names it sets."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(compile(code, str(folder / "README.md"), "exec"), names)
    return names
