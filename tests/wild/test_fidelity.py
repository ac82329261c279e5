"""Numbers that came out otherwise than the weights say, each by its line in the list of faults.

B1 float32 norms, B2 dtype of a plain load, B3 scales under bfloat16, B6 what beams promise, B8 pads
without a mask.
"""

import json
import logging
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b import quantization, quantization_cuda
from chatglm_6b.environment_chatglm import CACHE_NAME, kernels_off
from chatglm_6b.masking_chatglm import SpecialIds, locate, locate_new_tokens
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.quantization import QuantizedLinear, quantized_linear
from conftest import (
    REPO_SIZES,
    ROOT,
    TINY,
    build_model,
    count_calls,
    import_from_package,
    pad_rows,
)
from ptx.cases import simulate
from safetensors.torch import load_file
from transformers import AutoModel

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


def read_scales(model: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name.endswith("weight_scale")}


@pytest.fixture
def half_folder(tiny_model: Any, tmp_path: Path) -> Path:
    tiny_model.half().save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def load(folder: Path, **options: Any) -> Any:
    return ChatGLMForConditionalGeneration.from_pretrained(folder, **options)


@pytest.mark.parametrize("options", [{}, {"group_size": 32, "embeddings": True}], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_b3_scales_are_float32_under_bfloat16_on_every_road(
    bits: int, options: dict[str, Any], half_folder: Path, tmp_path: Path
) -> None:
    asked = {"quantization_config": {"quant_method": "chatglm", "bits": bits, **options}}
    fields = {f"quantization_{name}": value for name, value in options.items()}
    fields["quantization_bit"] = bits
    load(half_folder, dtype=torch.float16).quantize(bits, **options).save_pretrained(tmp_path / "q")
    bfloat16 = {"dtype": torch.bfloat16}
    roads = {
        "in memory": load(half_folder, **bfloat16).quantize(bits, **options),
        "cast before": load(half_folder, dtype=torch.float16).bfloat16().quantize(bits, **options),
        "cast after": load(half_folder, dtype=torch.float16).quantize(bits, **options).bfloat16(),
        "while loading": load(half_folder, **bfloat16, **asked),
        "by the configuration": load(half_folder, **bfloat16, **fields),
        "from a packed folder": load(tmp_path / "q", **bfloat16),
    }
    for road, model in roads.items():
        scales = read_scales(model)
        assert scales and {scale.dtype for scale in scales.values()} == {torch.float32}, road
        assert model.dtype == torch.bfloat16, road


@pytest.mark.parametrize("bits", [4, 8])
def test_b3_the_scales_of_a_bfloat16_model_are_those_of_half(bits: int, tiny_model: Any) -> None:
    wide, narrow = build_model().bfloat16(), build_model().bfloat16().float()
    scales = read_scales(narrow.quantize(bits))
    assert {scale.dtype for scale in scales.values()} == {torch.float16}
    for name, scale in read_scales(wide.quantize(bits)).items():
        assert torch.equal(scale, scales[name].float())


def test_b3_the_kernels_take_a_bfloat16_model_and_say_once_what_they_decline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, quantization_cuda.__name__)
    linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    with simulate() as machine, torch.no_grad():
        monkeypatch.setitem(quantization.KERNEL_FINDERS, "cpu", lambda device: machine.kernels)
        layer = QuantizedLinear.from_linear(linear, 4)
        layer(torch.ones(1, 64, dtype=torch.bfloat16))
        assert len(machine.driver.launches) == 1 and not caplog.records
        for _ in range(2):
            input = torch.ones(1, 64, dtype=torch.bfloat16)
            quantized_linear(input, layer.weight, layer.weight_scale.half(), 4)
    assert len(machine.driver.launches) == 1
    (record,) = caplog.records
    assert "no kernel for torch.bfloat16 with scales of torch.float16" in record.getMessage()
    assert "bfloat16()" in record.getMessage()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_b2_a_plain_load_has_the_dtype_of_the_configuration(
    stored: torch.dtype, tiny_model: Any, tmp_path: Path
) -> None:
    tiny_model.to(stored).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for key in ("dtype", "torch_dtype"):  # the second is the official one
        others = {k: v for k, v in fields.items() if k not in ("dtype", "torch_dtype")}
        path.write_text(json.dumps(others | {key: str(stored).removeprefix("torch.")}))
        for named in ({}, {"dtype": None}, {"dtype": "auto"}):
            model = load(tmp_path, **named)
            assert {p.dtype for p in model.parameters()} == {stored}
            assert model.config.dtype == stored
    path.write_text(json.dumps(others))  # then that of the weights
    assert {p.dtype for p in load(tmp_path).parameters()} == {stored}


def test_b2_a_dtype_that_is_named_is_what_comes(half_folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, "float32"):
        expected = torch.float32 if isinstance(dtype, str) else dtype
        assert {p.dtype for p in load(half_folder, dtype=dtype).parameters()} == {expected}
    model = load(half_folder).quantize(4)
    assert model.dtype == torch.float16
    assert {scale.dtype for scale in read_scales(model).values()} == {torch.float16}


def test_b2_so_do_the_auto_classes(tiny_repo: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_repo, tmp_path / "model")
    model = build_model(**REPO_SIZES).half()
    model.save_pretrained(tmp_path / "model")
    fields = json.loads((tiny_repo / "config.json").read_text()) | {"torch_dtype": "float16"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    loaded = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True)
    held = sum(parameter.nbytes for parameter in loaded.parameters())
    assert held == sum(parameter.nbytes for parameter in model.parameters())  # not twice as much


@torch.no_grad()
def test_b6_a_beam_s_score_is_divided_by_the_length_of_its_answer() -> None:
    """What README and differences.md say of transformers, with beams that end at other lengths."""
    model = build_model(spread=5)
    prompt = torch.tensor([ROWS[0][:4]])
    ends = list(range(20, 60))  # many, so that beams end early
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 12}
    outputs = model.generate(prompt, eos_token_id=ends, **options)
    answers = [[i for i in row[4:].tolist() if i != PAD] for row in outputs.sequences]
    assert len({len(answer) for answer in answers}) > 1
    for answer, score in zip(answers, outputs.sequences_scores.tolist()):
        ids = torch.cat((prompt, torch.tensor([answer])), dim=1)
        logits = model(ids).logits[0, 3:-1].float().log_softmax(dim=-1)
        total = logits.gather(1, torch.tensor(answer)[:, None]).sum().item()
        assert score == pytest.approx(total / len(answer), rel=1e-4)


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "docs/differences.md"])
def test_b6_the_documents_promise_no_equal_beams(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.search(r"4 of 140 held-out cases|140 个留出用例里有 4 个", text)
    assert "greedy and beam search" not in text and "贪心搜索和束搜索" not in text


@pytest.fixture
def official_folder(tmp_path: Path) -> Path:
    """Half matrices beside float32 norms, as in the official shards."""
    model = build_model().half()
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
            for parameter in module.parameters():
                parameter.data += torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
    model.save_pretrained(tmp_path / "official")
    return tmp_path / "official"


def list_norms(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "layernorm" in name}


@torch.no_grad()
def test_b1_float32_norms_stay_so_in_a_plain_load(official_folder: Path, tmp_path: Path) -> None:
    stored = load_file(official_folder / "model.safetensors")
    for options in ({}, {"dtype": "auto"}, {"device_map": "cpu"}):
        model = load(official_folder, **options)
        assert model.dtype == torch.float16
        norms = list_norms(model)
        assert len(norms) == 14
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if name in norms else torch.float16), name
            assert torch.equal(parameter, stored[name].to(parameter.dtype)), name
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    exact = load(official_folder, dtype=torch.float32)
    ids = torch.tensor(ROWS[:1])
    assert torch.equal(model.float()(ids).logits, exact(ids).logits)


@pytest.mark.parametrize("door", ["package", "hub"])
def test_b1_both_doors_keep_them(door: str, tiny_repo: Path, tmp_path: Path) -> None:
    """Shards of torch, as the official ones are."""
    folder = Path(shutil.copytree(tiny_repo, tmp_path / "repo"))
    stored = load_file(folder / "model.safetensors")
    stored = {k: v if "layernorm" in k else v.half() for k, v in stored.items()}
    (folder / "model.safetensors").unlink()
    torch.save(stored, folder / "pytorch_model.bin")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"torch_dtype": "float16"}))
    if door == "package":
        with import_from_package("chatglm.door").package_code():
            model = AutoModel.from_pretrained(folder)
    else:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert {state[name].dtype for name in list_norms(model)} == {torch.float32}
    assert model.dtype == torch.float16


def test_b1_a_dtype_that_is_named_holds_for_norms_too(official_folder: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert {p.dtype for p in load(official_folder, dtype=dtype).parameters()} == {dtype}
    assert {p.dtype for p in load(official_folder).half().parameters()} == {torch.float16}


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_b1_norms_stay_float32_around_packed_layers(bits: int, official_folder: Path) -> None:
    asked = {"quant_method": "chatglm", "bits": bits, "embeddings": True}
    model = load(official_folder, quantization_config=asked)
    expected = load(official_folder).quantize(bits, embeddings=True)
    for found in (model, expected):
        assert {norm.dtype for norm in list_norms(found).values()} == {torch.float32}
        assert found.dtype == found.get_input_embeddings().dtype == torch.float16
    ids = torch.tensor(ROWS[:1])
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.dequantize().lm_head.weight.dtype == torch.float16


@torch.no_grad()
def test_b1_norms_are_computed_in_float32(official_folder: Path) -> None:
    norm = load(official_folder).transformer.layers[0].input_layernorm
    states = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).half()
    found = norm(states)
    exact = torch.nn.functional.layer_norm(states.float(), (64,), norm.weight, norm.bias, norm.eps)
    assert found.dtype == torch.float16
    assert torch.equal(found, exact.half())
    assert not torch.equal(found, norm.half()(states))


@torch.no_grad()
def test_b1_decoding_with_float32_norms_keeps_the_engine(
    official_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps run as one program, and give what exact ones give."""
    decoding_step = import_from_package("chatglm.cpu.decoding_step")
    model, exact = load(official_folder), load(official_folder, dtype=torch.float32)
    passes: Counter[str] = Counter()
    count_calls(monkeypatch, decoding_step.StepProgram, "run", passes)
    cache, truth = (m(torch.tensor(ROWS[:1]))[CACHE_NAME] for m in (model, exact))
    for token in (13, 14, 15):
        new = torch.tensor([[token]])
        with kernels_off():
            plain = exact(new, **{CACHE_NAME: truth}).logits
        found = model(new, **{CACHE_NAME: cache}).logits.float()
        assert (found - plain).abs().max() < 0.02 * plain.abs().max()
    assert passes["run"] == (3 if decoding_step.can_run() else 0)
