"""Compiles kernels for the CPU it runs on, by LLVM.

Owns what this CPU can do, the compiler, and the kernels that were compiled. Knows nothing of models
or formats. The compiler is the package `llvmlite`; without it there are no kernels, and who asks
for one is told so by None.
"""

import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any

from transformers.utils import logging

from chatglm.cpu.kernel_cache import read_cached, write_cached
from chatglm.cpu.runtime import Kernel
from chatglm.cpu.writer import KernelSource, KernelWriter, Processor

logger = logging.get_logger(__name__)

OLDEST_LLVMLITE = (0, 45)
# What LLVM raises, what the system does, and what another release of llvmlite would.
COMPILER_ERRORS = (RuntimeError, OSError, ValueError, AttributeError, TypeError)

# In the order of preference: what a CPU must offer, and how wide its dot products are.
DOTS = (
    ("vnni", ("avx512vnni", "avx512bw", "avx512vl"), 16),
    ("avx-vnni", ("avxvnni", "avx2"), 8),
    ("avx2", ("avx2", "fma"), 8),
    ("neon", ("dotprod",), 8),  # by twos: a vector of bytes must hold a group of columns
    ("generic", (), 8),
)


class Compiler:
    """LLVM for one processor.

    Args:
        processor: by default the one this runs on.
    """

    def __init__(self, processor: Processor | None = None) -> None:
        self.ir: Any = importlib.import_module("llvmlite.ir")
        self.binding: Any = importlib.import_module("llvmlite.binding")
        self.binding.initialize_native_target()
        self.binding.initialize_native_asmprinter()
        self.processor = processor or self._find_processor()
        self.machine = self._make_machine()

    @functools.cached_property
    def engine(self) -> Any:
        """What owns the code of all kernels, and a machine of its own."""
        return self.binding.create_mcjit_compiler(
            self.binding.parse_assembly(""), self._make_machine()
        )

    def _make_machine(self) -> Any:
        triple = self.processor.triple
        if triple is not None:
            self.binding.initialize_all_targets()
            self.binding.initialize_all_asmprinters()
        target = self.binding.Target.from_triple(triple or self.binding.get_default_triple())
        return target.create_target_machine(
            cpu=self.processor.name, features=self.processor.features, opt=3, jit=True
        )

    def _find_processor(self) -> Processor:
        found = self.binding.get_host_cpu_features()
        dot, lanes = next((d, n) for d, needed, n in DOTS if all(found.get(f) for f in needed))
        return Processor(self.binding.get_host_cpu_name(), found.flatten(), dot, lanes)

    def load(self, code: bytes, name: str) -> int:
        """Return the address of the kernel of this name in an object file."""
        self.engine.add_object_file(self.binding.object_file.ObjectFileRef.from_data(code))
        self.engine.finalize_object()
        return self.engine.get_function_address(name)

    def translate(self, text: str) -> bytes:
        """Return the object file of a module, optimized."""
        return self.machine.emit_object(self.optimize(text))

    def optimize(self, text: str) -> Any:
        """Return a module as LLVM would have it for this processor."""
        binding = self.binding
        module = binding.parse_assembly(text)
        module.verify()
        options = binding.create_pipeline_tuning_options(speed_level=3)
        options.loop_unrolling = False  # what should be unrolled is written so
        builder = binding.create_pass_builder(self.machine, options)
        builder.getModulePassManager().run(module, builder)
        return module


@functools.cache
def find_compiler() -> Compiler | None:
    """Return the compiler for this CPU; None, with one line in the log, if there is none."""
    try:
        version = importlib.import_module("llvmlite").__version__
        if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_LLVMLITE:
            return Compiler()
        problem = f"llvmlite {version} is older than {'.'.join(map(str, OLDEST_LLVMLITE))}"
    except (ImportError, *COMPILER_ERRORS) as error:
        problem = str(error)
    _explain(problem)
    return None


def _explain(problem: str) -> None:
    """Say once why the CPU kernels are not used."""
    logger.warning_once(
        f"ChatGLM's CPU kernels are not used, torch's slower operations are: {problem}. "
        "`pip install llvmlite` brings what they need."
    )


@functools.cache
def find_kernel(source: KernelSource, *parameters: Any) -> Kernel | None:
    """Return a kernel compiled for this CPU and these parameters; None if that is not possible."""
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        name = _name_kernel(compiler, source, parameters)
        code = read_cached(name)
        if code is None:
            code = translate_kernel(compiler, source, name, parameters)
            write_cached(name, code)
        return Kernel(compiler.load(code, name), source.slots)
    except COMPILER_ERRORS as error:
        _explain(f"a kernel could not be compiled ({error})")
        return None


def translate_kernel(
    compiler: Compiler, source: KernelSource, name: str, parameters: tuple[Any, ...]
) -> bytes:
    """Return the object file of a kernel."""
    writer = KernelWriter(compiler, name, source.slots)
    source.write(writer, *parameters)
    return compiler.translate(writer.finish())


def _name_kernel(compiler: Compiler, source: KernelSource, parameters: tuple[Any, ...]) -> str:
    """Return a name that tells apart all that a kernel's code depends on."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    parts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    version = importlib.import_module("llvmlite").__version__
    parts += [version, repr(compiler.processor), repr(parameters)]
    digest = hashlib.sha256("|".join(parts).encode()).hexdigest()
    return f"{source.write.__name__}_{digest[:24]}"
