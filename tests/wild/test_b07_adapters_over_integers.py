"""B7: adapters of peft over packed weights compute what they do over the same weights as floats.

Those that need the weight itself, to be merged into it, made from it or to compute with it, are
refused: they ended in torch's errors of shapes, and over 8 bits some answered with other numbers.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from conftest import build_model, import_from_package
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

IDS = torch.tensor([[7, 8, 9, 301, 304, 11, 12]])
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
REFUSED = r"needs the weight of QuantizedLinear.*packed integers.*dequantize\(\), .*chatglm merge"
# Not of layers, or made of other adapters.
OTHERS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
    "CPT", "CARTRIDGE", "XLORA", "POLY", "LN_TUNING", "TRAINABLE_TOKENS", "MIXED",
}  # fmt: skip
TUNERS = sorted({getattr(t, "value", t) for t in PEFT_TYPE_TO_CONFIG_MAPPING} - OTHERS)
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["dense"], "init_ia3_weights": False},
    "OFT": {"oft_block_size": 4, "r": 0},
    "VBLORA": {"num_vectors": 4, "vector_length": 16},
    "WAVEFT": {"n_frequency": 10},
}
# Of these it is known that they read the weight where nothing fails.
SILENT = ("HIRA", "HRA", "PEANUT")
RIGHT = ("LORA", "ADALORA", "BOFT", "FOURIERFT", "IA3", "OFT", "ROAD", "VERA", "VBLORA", "RANDLORA")
MADE_FROM_WEIGHTS = ("dora", "pissa", "olora", "orthogonal")

both_bits = pytest.mark.parametrize("bits", [4, 8])
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    # peft's own words, of methods that nobody asked for.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning:peft"),
]


def pack(bits: int) -> Any:
    return build_model().quantize(bits, activations="exact")


def make_config(name: str) -> Any:
    """A configuration of a tuner that targets every packed layer."""
    kind = next(c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if getattr(t, "value", t) == name)
    options = {"target_modules": TARGETS, **OPTIONS.get(name, {})}
    if "r" in kind.__dataclass_fields__ and "r" not in options:
        options["r"] = 4
    return kind(**options)


def make_lora(kind: str) -> Any:
    how = {"use_dora": True} if kind == "dora" else {"init_lora_weights": kind}
    return peft.LoraConfig(r=4, target_modules=TARGETS, **how)


# Changes no number as it is set up here, over plain layers neither, so that equality shows little.
IDLE = {"UNILORA"}


def adapt(model: Any, config: Any) -> Any:
    """Put an adapter around a model, with weights that do something."""
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return adapted


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(IDS).logits


@both_bits
@pytest.mark.parametrize("name", TUNERS)
def test_every_adapter_is_right_or_refused(name: str, bits: int) -> None:
    try:
        config = make_config(name)
    except ImportError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    try:
        adapted = adapt(pack(bits), config)
        found = logits_of(adapted)
    except Exception as error:  # whatever stops here gives no wrong number
        assert name not in RIGHT
        assert name not in SILENT or re.search(REFUSED, str(error))
        return
    assert name not in SILENT
    plain = copy.deepcopy(adapted)
    plain.get_base_model().dequantize()
    expected, bare = logits_of(plain), logits_of(pack(bits))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    # Nothing would be shown by an adapter that does nothing.
    assert ((expected - bare).abs().max() > 1e-5 * bare.abs().max()) == (name not in IDLE)


@both_bits
@pytest.mark.parametrize("kind", MADE_FROM_WEIGHTS)
def test_what_is_made_from_the_weights_is_refused(kind: str, bits: int) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        peft.get_peft_model(pack(bits), make_lora(kind))


@both_bits
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ["LORA", "IA3", "OFT"])
def test_no_adapter_is_merged_into_integers(name: str, safe: bool, bits: int) -> None:
    adapted = adapt(pack(bits), make_config(name))
    expected = logits_of(adapted)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(ValueError, match=REFUSED) as caught:
            merge(safe_merge=safe)
        assert "\n" not in str(caught.value)
    assert not merged_layers(adapted)
    assert torch.equal(logits_of(adapted), expected)


def merged_layers(adapted: Any) -> list[str]:
    return [n for n, m in adapted.named_modules() if getattr(m, "merged_adapters", None)]


@both_bits
@pytest.mark.parametrize("name", ["LORA", "IA3", "OFT"])
def test_the_remedy_of_the_refusal_merges(name: str, bits: int) -> None:
    adapted = adapt(pack(bits), make_config(name))
    expected = logits_of(adapted)
    adapted.get_base_model().dequantize()
    merged = adapted.merge_and_unload()
    assert type(merged.transformer.layers[0].attention.dense) is nn.Linear
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-3, atol=1e-3)


WEIGHTED: dict[str, Callable[[Any], None]] = {
    kind: lambda adapted, kind=kind: adapted.add_weighted_adapter(
        ["default", "second"], [0.7, 0.4], "both", combination_type=kind
    )
    for kind in ("linear", "cat", "svd")
}


@both_bits
@pytest.mark.parametrize("kind", WEIGHTED)
def test_adapters_are_combined_over_integers(kind: str, bits: int) -> None:
    """Of two adapters' own matrices, which a packed weight has no part in."""
    adapted = peft.get_peft_model(pack(bits), make_config("LORA")).eval()
    adapted.add_adapter("second", make_config("LORA"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    WEIGHTED[kind](adapted)
    adapted.set_adapter("both")
    plain = copy.deepcopy(adapted)
    plain.get_base_model().dequantize()
    found = logits_of(adapted)
    torch.testing.assert_close(found, logits_of(plain), rtol=1e-3, atol=1e-3)
    adapted.set_adapter("default")
    assert not torch.equal(found, logits_of(adapted))


@both_bits
def test_an_adapter_is_taken_off_and_put_back(bits: int) -> None:
    packed, adapted = pack(bits), adapt(pack(bits), make_config("LORA"))
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), logits_of(packed))
    assert not torch.equal(logits_of(adapted), logits_of(packed))
    assert torch.equal(logits_of(adapted.unload()), logits_of(packed))


def test_the_command_that_is_named_exists() -> None:
    merge = import_from_package("chatglm.cli")
    with pytest.raises(SystemExit) as ended:
        merge.main(["merge", "--help"])
    assert ended.value.code == 0
