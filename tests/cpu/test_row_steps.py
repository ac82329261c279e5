"""Steps of rows as programs: bit for bit what each row has alone, and what the modules compute."""

from typing import Any

import pytest
import torch
from chatglm_6b.environment_chatglm import kernels_off
from chatglm_6b.rows_chatglm import Row, decode_rows, read_prompt
from conftest import build_model

pytest.importorskip("llvmlite")
decoding_step = pytest.importorskip("chatglm.cpu.decoding_step", exc_type=ImportError)

PROMPTS = [[5, 197, 86, 301, 304], [5, 6, 7, 8, 9, 10, 301, 304], [5, 6, 7, 8], list(range(20, 90))]
STEPS = ([[7], [8], [9], [10]], [[301], [11, 12], [304], [13, 14]], [[15], [16], [17], [18]])
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def build_rows(model: Any) -> list[Row]:
    return [read_prompt(model, prompt)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_row_s_states_do_not_know_its_company(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
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
    together, alone, plain = build_rows(model), build_rows(model), build_rows(model)
    for step in STEPS:
        for rows in (together, alone, plain):
            for row, ids in zip(rows, step):
                row.append(*ids)
        found = decode_rows(model, together)
        assert all(torch.equal(x, decode_rows(model, [row])[0]) for x, row in zip(found, alone))
        with kernels_off():
            expected = decode_rows(model, plain)
        if not bits:  # rounded inputs are another product
            torch.testing.assert_close(found, expected, rtol=0, atol=BOUNDS[dtype])
    assert sizes == [n for step in STEPS for n in (sum(map(len, step)), *map(len, step))]
    assert torch.equal(found[3], decode_rows_in_other_company(model, together))


def decode_rows_in_other_company(model: Any, rows: list[Row]) -> Any:
    """Take the last row's last step back, and once more beside one other."""
    rows[3].crop(len(rows[3].input_ids) - 1)
    rows[3].append(STEPS[-1][3][0])
    rows[0].append(9)
    return decode_rows(model, [rows[3], rows[0]])[0]
