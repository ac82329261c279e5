"""A decoding step on a CPU as one native call: all blocks of the network, without Python between.

At a few tokens a step the time between the kernels counts: some forty calls of torch a block, each
of microseconds. Here the kernels of a step stand in a list, each with the slots it is run with, and
one more kernel lets all threads go through that list together, stage by stage. Only what changes
from token to token is written anew.

Owns the list and the kernel that runs it. Knows nothing of modules, nor of what a stage computes:
`decoding_step` says which stages a model's blocks have.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from chatglm.cpu.compiler import find_kernel
from chatglm.cpu.runtime import Call, find_runtime
from chatglm.cpu.writer import KernelSource, KernelWriter

SPINS_BEFORE_YIELD = 4000  # looks at a stage's end before the processor is offered to others
LOOKS_BEFORE_SLEEP = 4100  # looks, the last hundred with an offer each, before a thread sleeps
SLEEP = 50  # microseconds; whoever has slept is given the processor soon


def write_run_stages(writer: KernelWriter) -> None:
    """Go through the stages, any number of threads together.

    A stage is an address of a kernel and one of its slots. A thread counts itself in, runs the
    kernel, which returns when no block is left to claim, and counts itself out: the stage is done
    when nobody is in. So a thread is waited for only while it has a block in hand, and one that the
    system keeps off the processor finds the stages done that the others went through without it.
    """
    builder, at = writer.builder, writer.slot
    released = writer.address(at("released"))
    with writer.loop(writer.const(0), at("count")) as index:
        turn = writer.add(index, 1)
        done = builder.load_atomic(released, "acquire", 8, typ=writer.i64)
        with writer.when(builder.icmp_signed("<", done, turn)):
            inside = writer.address(writer.add(at("inside"), writer.times(index, 8)))
            builder.atomic_rmw("add", inside, writer.i64(1), "acq_rel")
            stage = writer.add(at("stages"), writer.times(index, 16))
            kernel = writer.load(writer.address(stage), writer.i64)
            slots = writer.load(writer.address(stage, 8), writer.i64)
            writer.call_address(kernel, writer.ir.VoidType(), writer.address(slots))
            found = builder.atomic_rmw("sub", inside, writer.i64(1), "acq_rel")
            with writer.when(builder.icmp_signed("==", found, writer.const(1))):
                builder.atomic_rmw("max", released, turn, "acq_rel")
            _wait(writer, released, turn)


def _wait(writer: KernelWriter, place: Any, value: Any) -> None:
    """Look at a number until it is a value or more; after a while yield, and then sleep."""
    builder, append = writer.builder, writer.function.append_basic_block
    before, head, again, tired, after = builder.block, append(), append(), append(), append()
    builder.branch(head)
    builder.position_at_end(head)
    looks = builder.phi(writer.i64)
    looks.add_incoming(writer.const(0), before)
    found = builder.load_atomic(place, "acquire", 8, typ=writer.i64)
    builder.cbranch(builder.icmp_signed("<", found, value), again, after)
    builder.position_at_end(again)
    writer.pause()
    looked = writer.add(looks, 1)
    looks.add_incoming(looked, again)
    is_tired = builder.icmp_signed(">", looked, writer.const(SPINS_BEFORE_YIELD))
    builder.cbranch(is_tired, tired, head)
    builder.position_at_end(tired)
    _rest(writer, looked)
    looks.add_incoming(looked, builder.block)
    builder.branch(head)
    builder.position_at_end(after)


def _rest(writer: KernelWriter, looked: Any) -> None:
    """Offer the processor to others, the longer the more a thread has looked already."""
    is_long = writer.builder.icmp_signed(">", looked, writer.const(LOOKS_BEFORE_SLEEP))
    with writer.builder.if_else(is_long) as (then, otherwise):
        with then:
            writer.call_address(writer.slot("sleep"), writer.i32, writer.i32(SLEEP))
        with otherwise:
            writer.call_address(writer.slot("yield"), writer.i32)


RUN_STAGES = KernelSource(
    ("count", "stages", "inside", "released", "yield", "sleep"), write_run_stages
)


class StepGraph:
    """Stages that are run one after another by all threads.

    Args:
        calls: the stages, with everything in their slots that does not change.
        threads: at least 1.
        kept: what the slots point to, to be kept alive.

    Raises:
        RuntimeError: if torch's threads cannot be reached; ask `can_run` first.
    """

    def __init__(self, calls: Sequence[Call], threads: int, kept: Sequence[Any]) -> None:
        kernel, runtime = find_kernel(RUN_STAGES), find_runtime()
        if kernel is None or runtime is None:
            raise RuntimeError("a program needs the kernels' compiler and torch's OpenMP threads")
        self._calls, self._kept = calls, kept
        self._slots = [call.lay_out() for call in calls]
        pairs = []
        for call, slots in zip(calls, self._slots):
            pairs += [call.address, ctypes.addressof(slots)]
        self._stages = (ctypes.c_int64 * len(pairs))(*pairs)
        # The first number, on a cache line of its own, is looked at all the time.
        self._counters = torch.zeros(32 + len(calls), dtype=torch.int64, device="cpu")
        self._run_stages = kernel.prepare(
            threads,
            count=len(calls),
            stages=ctypes.addressof(self._stages),
            inside=self._counters.data_ptr() + 256,
            released=self._counters.data_ptr(),
            sleep=runtime.sleep,
            **{"yield": runtime.yield_processor},
        )

    def change(self, stage: int, **values: int) -> None:
        """Write anew what stands in some slots of a stage."""
        slots, places = self._slots[stage], self._calls[stage].places
        for name, value in values.items():
            slots[places[name]] = value

    def run(self) -> None:
        """Run all stages; return when the last one is done."""
        self._counters.zero_()
        for slots in self._slots:
            slots[0] = 0  # a late thread may look at a stage's counter until the end of the run
        self._run_stages.run()


def can_run() -> bool:
    """Tell whether programs can be run here."""
    return find_runtime() is not None and find_kernel(RUN_STAGES) is not None


__all__ = ["StepGraph", "can_run"]
