"""Numbers that came out otherwise than the weights say, each by its line in the list of faults.

B8 pads without a mask.
"""

from typing import Any

import pytest
import torch
from chatglm_6b.environment_chatglm import CACHE_NAME
from chatglm_6b.masking_chatglm import SpecialIds, locate, locate_new_tokens
from conftest import TINY, build_model, pad_rows

GMASK, SOP, PAD = TINY["gmask_token_id"], TINY["bos_token_id"], TINY["pad_token_id"]
ROWS = [[5, 9, GMASK, SOP, 7, 8], [11, 5, 17, 23, GMASK, SOP], [29, 31, GMASK, SOP, 12]]


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids with pads on the left, and their mask."""
    ids = torch.tensor(pad_rows(ROWS, "left"))
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("is_2d", [True, False])
@pytest.mark.parametrize("name", ["ChatGLMForConditionalGeneration", "ChatGLMModel"])
@torch.no_grad()
def test_b8_forward_tells_pads_by_their_id(name: str, is_2d: bool) -> None:
    model = build_model(name, position_encoding_2d=is_2d)
    ids, mask = padded_batch()
    told, inferred = model(ids, attention_mask=mask)[0], model(ids)[0]
    assert torch.equal(told, inferred)
    alone = model(torch.tensor(ROWS[:1]))[0][0]
    torch.testing.assert_close(inferred[0][mask[0] == 1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_b8_forward_and_generate_infer_the_same(tiny_model: Any) -> None:
    ids, mask = padded_batch()
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    options |= {"max_new_tokens": 1, "do_sample": False}
    first = tiny_model.generate(ids, **options).logits[0]
    torch.testing.assert_close(tiny_model(ids).logits[:, -1].float(), first, atol=1e-6, rtol=1e-6)
    # Who says that they are real is believed by both.
    first = tiny_model.generate(ids, attention_mask=torch.ones_like(mask), **options).logits[0]
    logits = tiny_model(ids, torch.ones_like(mask)).logits[:, -1]
    torch.testing.assert_close(logits.float(), first, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_b8_the_id_of_pads_may_stand_in_a_row_and_behind_it(tiny_model: Any) -> None:
    ids = torch.tensor([[5, PAD, 9, GMASK, SOP, PAD, 7, PAD, PAD]])
    assert torch.equal(tiny_model(ids).logits, tiny_model(ids, torch.ones_like(ids)).logits)


@torch.no_grad()
def test_b8_steps_behind_a_cache_know_the_pads_too(tiny_model: Any) -> None:
    ids, mask = padded_batch()
    told, inferred = tiny_model(ids, mask), tiny_model(ids)
    for token in (13, 14):
        new = torch.full((len(ROWS), 1), token)
        mask = torch.cat((mask, torch.ones_like(new)), dim=1)
        told = tiny_model(new, mask, **{CACHE_NAME: told[CACHE_NAME]})
        inferred = tiny_model(new, **{CACHE_NAME: inferred[CACHE_NAME]})
        assert torch.equal(told.logits, inferred.logits)


@torch.no_grad()
def test_b8_rows_without_pads_take_the_path_they_took(tiny_model: Any) -> None:
    ids = torch.tensor([ROWS[0], ROWS[1]])
    cache = tiny_model(ids)[CACHE_NAME]
    with_pad = tiny_model.transformer.special_ids
    assert with_pad.pad == PAD
    for special_ids in (with_pad, with_pad._replace(pad=None)):
        step = locate_new_tokens(torch.tensor([[13], [14]]), None, cache, special_ids)
        assert step.attention_mask is None
        embeddings = torch.zeros(2, 6, 4)
        found = locate(ids, embeddings, None, None, None, special_ids, 2)
        expected = locate(ids, embeddings, torch.ones_like(ids), None, None, special_ids, 2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_b8_an_end_token_is_no_pad() -> None:
    model = build_model(pad_token_id=TINY["eos_token_id"], eos_token_id=TINY["eos_token_id"])
    assert model.transformer.special_ids == SpecialIds(SOP, TINY["mask_token_id"], GMASK, None)
    model = build_model(pad_token_id=7, eos_token_id=[7, 8])
    assert model.transformer.special_ids.pad is None


@torch.no_grad()
def test_b8_a_compiled_pass_infers_pads_without_asking(tiny_model: Any) -> None:
    ids, mask = padded_batch()
    compiled = torch.compile(tiny_model.forward, fullgraph=True, backend="eager")
    for given in (ids, torch.tensor([[*row, 9][:6] for row in ROWS])):
        expected = tiny_model(given, (given != PAD).long(), use_cache=False).logits
        found = compiled(given, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    exported = torch.export.export(tiny_model, (ids,), {"use_cache": False}, strict=False).module()
    found = exported(ids, use_cache=False).logits
    torch.testing.assert_close(found, tiny_model(ids, mask).logits, atol=1e-5, rtol=1e-5)
