"""Steps of rows as programs: bit for bit what each row has alone, and what the modules compute."""

import math
from typing import Any

import pytest
import torch
from chatglm_6b.cache_chatglm import ChatGLMCache, quantize_columns
from chatglm_6b.environment_chatglm import kernels_off
from chatglm_6b.rows_chatglm import Row, decode_rows, read_prompt
from conftest import build_model

pytest.importorskip("llvmlite")
decoding_step = pytest.importorskip("chatglm.cpu.decoding_step", exc_type=ImportError)
attention = pytest.importorskip("chatglm.cpu.attention", exc_type=ImportError)
compiler = pytest.importorskip("chatglm.cpu.compiler", exc_type=ImportError)
writer = pytest.importorskip("chatglm.cpu.writer", exc_type=ImportError)

PROMPTS = [[5, 197, 86, 301, 304], [5, 6, 7, 8, 9, 10, 301, 304], [5, 6, 7, 8], list(range(20, 90))]
STEPS = ([[7], [8], [9], [10]], [[301], [11, 12], [304], [13, 14]], [[15], [16], [17], [18]])
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


# Of each row of a step, whether its cache keeps integers.
CACHES = {"floats": [None] * 4, "integers": [8] * 4, "both": [8, None, None, 8]}


def build_rows(model: Any, caches: str = "floats") -> list[Row]:
    return [
        read_prompt(model, prompt, ChatGLMCache(bits=bits))[0]
        for prompt, bits in zip(PROMPTS, CACHES[caches])
    ]


@pytest.mark.parametrize("caches", CACHES)
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_row_s_states_do_not_know_its_company(
    bits: int, dtype: torch.dtype, caches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(spread=1).to(dtype)
    model = model.quantize(bits) if bits else model
    model.lm_head = torch.nn.Identity()  # what it multiplies is what is compared
    sizes: list[int] = []
    run = decoding_step.StepProgram.run

    def note(self: Any, *args: Any) -> Any:
        sizes.append(self.shape.tokens)
        return run(self, *args)

    monkeypatch.setattr(decoding_step.StepProgram, "run", note)
    together, alone, plain = (build_rows(model, caches) for _ in range(3))
    for step in STEPS:
        for rows in (together, alone, plain):
            for row, ids in zip(rows, step):
                row.append(*ids)
        found = decode_rows(model, together)
        assert all(torch.equal(x, decode_rows(model, [row])[0]) for x, row in zip(found, alone))
        with kernels_off():
            expected = decode_rows(model, plain)
        if not bits:  # rounded inputs are another product
            # An 8-bit number that lies between two integers may become either.
            bound = BOUNDS[dtype] if caches == "floats" else max(BOUNDS[dtype], 2e-2)
            torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    assert sizes == [n for step in STEPS for n in (sum(map(len, step)), *map(len, step))]
    assert torch.equal(found[3], decode_rows_in_other_company(model, together))


def write_rounding(writer: Any, count: int) -> None:
    with writer.parallel_for(writer.const(1)):
        states = writer.load_as_float(writer.address(writer.slot("states")), count, "f32")
        integers, scale = attention.round_states(writer, states)
        writer.store(integers, writer.address(writer.slot("integers")))
        writer.store(scale, writer.address(writer.slot("scale")))


@pytest.mark.parametrize("count", [10, 24, 128])
@pytest.mark.parametrize("special", [None, 0.0, 1e30, -math.inf, math.nan])
def test_a_step_rounds_as_the_cache_does(count: int, special: float | None) -> None:
    states = torch.randn(count) if special != 0.0 else torch.zeros(count)
    states[1] = states[1] if special is None else special
    integers, scale = torch.full((count,), 99, dtype=torch.int8), torch.full((1,), 99.0)
    source = writer.KernelSource(("states", "integers", "scale"), write_rounding)
    kernel = compiler.find_kernel(source, count)
    assert kernel is not None
    places = {"states": states, "integers": integers, "scale": scale}
    kernel.prepare(1).run(**{name: place.data_ptr() for name, place in places.items()})
    expected_integers, expected_scale = quantize_columns(states)
    assert torch.equal(integers, expected_integers)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)


def decode_rows_in_other_company(model: Any, rows: list[Row]) -> Any:
    """Take the last row's last step back, and once more beside one other."""
    rows[3].crop(len(rows[3].input_ids) - 1)
    rows[3].append(STEPS[-1][3][0])
    rows[0].append(9)
    return decode_rows(model, [rows[3], rows[0]])[0]
