"""Rotary tables and their application, against the original's tables and a written-out rotation."""

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.rotary_chatglm import RotaryEmbedding, apply_rotary
from golden_model import find_golden, load_arrays

LATE = find_golden("model_late")
TABLES = {
    "real2d_dim64": (4096, 32, True),
    "real1d_dim128": (4096, 32, False),
    "tiny2d_dim8": (64, 4, True),
    "tiny1d_dim16": (64, 4, False),
}


def build(hidden_size: int, heads: int, is_2d: bool) -> RotaryEmbedding:
    config = ChatGLMConfig(
        hidden_size=hidden_size, num_attention_heads=heads, position_encoding_2d=is_2d
    )
    return RotaryEmbedding(config)


@pytest.mark.parametrize("name", TABLES)
def test_tables_equal_the_original_in_float32(name: str) -> None:
    arrays = load_arrays(LATE, "rotary")
    positions = torch.as_tensor(arrays[f"{name}/positions"])
    cos, sin = build(*TABLES[name])(positions.view(1, 1, -1), torch.float32)
    for ours, key in ((cos, "cos"), (sin, "sin")):
        expected = arrays[f"{name}/fp32/{key}"].reshape(positions.numel(), -1)
        assert torch.equal(ours[0, 0, 0], expected), key


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_tables_are_nearer_to_float32_than_the_original(dtype: str) -> None:
    arrays = load_arrays(LATE, "rotary")
    positions = torch.as_tensor(arrays["real2d_dim64/positions"])
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    cos, _ = build(*TABLES["real2d_dim64"])(positions.view(1, 1, -1), half)
    truth = arrays["real2d_dim64/fp32/cos"].reshape(positions.numel(), -1)
    theirs = arrays[f"real2d_dim64/{dtype}/cos"].reshape(positions.numel(), -1).float()
    assert (cos[0, 0, 0].float() - truth).abs().max() < (theirs - truth).abs().max()
    assert cos.dtype == half


def rotate_slowly(vector: torch.Tensor, position: int) -> torch.Tensor:
    """Rotate pairs (i, i + D/2) of one vector by the angle of one position."""
    half = vector.numel() // 2
    rotated = vector.clone()
    for i in range(half):
        frequency = torch.tensor(10000.0 ** (-i / half)).half().item()
        angle = torch.tensor(position * frequency)
        rotated[i] = vector[i] * angle.cos() - vector[i + half] * angle.sin()
        rotated[i + half] = vector[i + half] * angle.cos() + vector[i] * angle.sin()
    return rotated


@pytest.mark.parametrize("num_positions", [1, 2])
def test_each_axis_turns_its_part_of_the_head(num_positions: int) -> None:
    torch.manual_seed(0)
    rotary = build(32, 2, num_positions == 2)
    states = torch.randn(1, 2, 3, 16)
    position_ids = torch.tensor([[4, 9, 9], [0, 1, 2]])[:num_positions].unsqueeze(0)
    rotated = apply_rotary(states, *rotary(position_ids, torch.float32))
    for head in range(2):
        for token in range(3):
            parts = states[0, head, token].chunk(num_positions)
            expected = [
                rotate_slowly(part, int(position_ids[0, axis, token]))
                for axis, part in enumerate(parts)
            ]
            torch.testing.assert_close(rotated[0, head, token], torch.cat(expected))


def test_context_leaves_the_block_half_alone() -> None:
    states = torch.randn(1, 2, 3, 16)
    position_ids = torch.tensor([[[5, 6, 7], [0, 0, 0]]])
    rotated = apply_rotary(states, *build(32, 2, True)(position_ids, torch.float32))
    assert torch.equal(rotated[..., 8:], states[..., 8:])
    assert not torch.equal(rotated[..., :8], states[..., :8])
