"""Defaults, validation and the version check of the configuration."""

from typing import Any

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig

OWN_IDS = {
    "bos_token_id": 304,
    "eos_token_id": 305,
    "mask_token_id": 300,
    "gmask_token_id": 301,
    "pad_token_id": 3,
}


@pytest.mark.parametrize(("vocab_size", "offset"), [(130528, 0), (150528, 20000)])
def test_ids_follow_from_the_generation(vocab_size: int, offset: int) -> None:
    config = ChatGLMConfig(vocab_size=vocab_size)
    ids = (config.mask_token_id, config.gmask_token_id, config.bos_token_id, config.eos_token_id)
    assert ids == tuple(offset + k for k in (130000, 130001, 130004, 130005))
    assert config.pad_token_id == offset + 3


def test_given_ids_win_over_the_generation() -> None:
    config = ChatGLMConfig(vocab_size=150528, pad_token_id=7)
    assert (config.pad_token_id, config.bos_token_id) == (7, 150004)


def test_an_own_vocabulary_must_say_its_ids() -> None:
    with pytest.raises(ValueError, match=r"vocab_size 320 .* gmask_token_id must be given"):
        ChatGLMConfig(vocab_size=320, **{**OWN_IDS, "gmask_token_id": None})
    assert ChatGLMConfig(vocab_size=320, **OWN_IDS).gmask_token_id == 301


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, r"hidden_size \(100\).*\(3\)"),
        ({"hidden_size": 24, "num_attention_heads": 4}, r"is 6; .* multiple of 4"),
        ({"quantization_bit": 5}, r"must be one of \(0, 4, 8\), got 5"),
        ({"pre_seq_len": 0}, "at least 1, got 0"),
        ({"num_layers": "28"}, "num_layers must be a whole number of at least 1, got '28'; use"),
        ({"vocab_size": True}, "vocab_size must be a whole number of at least 1, got True"),
        ({"num_attention_heads": 0}, "num_attention_heads .* at least 1, got 0; use the config"),
        ({"layernorm_epsilon": 0}, "layernorm_epsilon must be a number above 0, got 0; use"),
        ({"eos_token_id": "x"}, r"eos_token_id .* below vocab_size \(130528\), got 'x'; use"),
        ({"eos_token_id": [3, 130528]}, "eos_token_id must be .*, got 130528; use the config"),
        ({"pad_token_id": [3]}, r"pad_token_id must be .*, got \[3\]"),
        ({"dtype": "float17"}, "dtype 'float17', and it must be one of torch's: float32"),
        ({"torch_dtype": "nn"}, "dtype 'nn', and it must be one of torch's"),
    ],
)
def test_impossible_numbers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatGLMConfig(**fields)


def test_several_tokens_may_end_an_answer() -> None:
    assert ChatGLMConfig(eos_token_id=[130005, 3]).eos_token_id == [130005, 3]
    assert ChatGLMConfig(dtype="bfloat16").pad_token_id == 3


def test_one_position_axis_needs_less() -> None:
    config = ChatGLMConfig(hidden_size=24, num_attention_heads=4, position_encoding_2d=False)
    assert (config.head_dim, config.num_positions) == (6, 1)


def test_standard_names_reach_the_fields() -> None:
    config = ChatGLMConfig(num_layers=5, inner_hidden_size=12, max_sequence_length=77)
    assert (config.num_hidden_layers, config.intermediate_size) == (5, 12)
    assert config.max_position_embeddings == 77


def test_saving_and_loading_keeps_everything(tmp_path) -> None:
    config = ChatGLMConfig(vocab_size=320, **OWN_IDS, pre_seq_len=4, prefix_projection=True)
    config.save_pretrained(tmp_path)
    again = ChatGLMConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert again.tie_word_embeddings is True


def test_a_dtype_that_is_named_is_handed_on_to_the_model() -> None:
    """As the Auto classes ask; transformers 5.8 keeps it to the configuration alone."""
    fields = ChatGLMConfig().to_dict()
    config, unused = ChatGLMConfig.from_dict(
        fields, dtype=torch.float16, num_layers=3, other=1, return_unused_kwargs=True
    )
    assert unused == {"dtype": torch.float16, "other": 1} and config.num_layers == 3
    assert ChatGLMConfig.from_dict(fields, dtype=torch.float16).dtype == torch.float16
