"""Positions beyond the trained ones: what `rope_scaling` takes, and what it does to each axis."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.environment_chatglm import kernels_off
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.rotary_chatglm import RotaryEmbedding
from conftest import TINY, build_model, import_from_package
from transformers import AutoConfig, LlamaConfig, StaticCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LINEAR, DYNAMIC = ({"rope_type": name, "factor": 4.0} for name in ("linear", "dynamic"))
TRAINED = 16  # of the tiny models here, so that short inputs are long ones
GMASK, MASK, BOS, PAD = (TINY[f"{n}_token_id"] for n in ("gmask", "mask", "bos", "pad"))
ONE_AXIS = {"position_encoding_2d": False}


def build(scaling: dict[str, Any] | None = None, **fields: Any) -> Any:
    return build_model(rope_scaling=scaling, max_sequence_length=TRAINED, **fields)


def draw_prompt(length: int, blank: int = GMASK, place: int = -1) -> list[int]:
    """Ids of a context of that many tokens, its blank at a place, and `<sop>`."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(20, 290, (length,), generator=generator).tolist()
    ids[place] = blank
    return [*ids, BOS]


def angles_of(model: Any, position_ids: list[list[int]]) -> torch.Tensor:
    """The angles of the second of each axis' frequencies, `(P, S)`, within half a turn."""
    places = torch.tensor([position_ids])
    cos, sin = model.transformer.rotary_emb(places, torch.float32)
    return torch.atan2(sin, cos)[0, 0, :, :, 1]


@torch.no_grad()
def read_at_once(model: Any, ids: list[int], **options: Any) -> torch.Tensor:
    return model(torch.tensor([ids]), **options).logits[0]


@torch.no_grad()
def read_by_steps(model: Any, ids: list[int], context: int) -> torch.Tensor:
    """Read a context with its `<sop>`, then token by token: logits from `<sop>` on."""
    output = model(torch.tensor([ids[: context + 1]]), use_cache=True)
    cache, logits = output.get("cache", output.get("past_key_values")), [output.logits[0, -1]]
    for token in ids[context + 1 :]:
        logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_today_s_and_older_forms_are_one(name: str, key: str) -> None:
    given: Any = {name: {key: "dynamic", "factor": 4}}
    config = ChatGLMConfig(**given)
    assert config.rope_scaling == {
        "rope_type": "dynamic",
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "rope_theta": 10000.0,
    }
    assert config.max_sequence_length == config.max_position_embeddings == 8192


@pytest.mark.parametrize("value", [None, {}, {"rope_type": "default", "rope_theta": 10000.0}])
def test_no_scaling_is_none(value: Any) -> None:
    config = ChatGLMConfig(rope_scaling=value)
    assert config.rope_scaling is None and config.max_sequence_length == 2048
    assert "rope_parameters" not in config.to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("linear", "rope_scaling must be None or like .*, got 'linear'"),
        ([], r"rope_scaling must be None or like .*, got \[\]"),
        ({"factor": 2.0}, "the type None, and ChatGLM has 'linear' or 'dynamic': use"),
        ({"rope_type": "default", "factor": 2.0}, "'default' does not use: factor; it takes"),
        ({**LINEAR, "type": "dynamic"}, "the type 'linear' and 'dynamic', and ChatGLM has"),
        ({"rope_type": "linear"}, "needs a factor of at least 1, got None: 2.0 for twice"),
        ({"rope_type": "linear", "factor": 0.5}, "a factor of at least 1, got 0.5"),
        ({"rope_type": "linear", "factor": True}, "a factor of at least 1, got True"),
        ({"rope_type": "linear", "factor": "2"}, "a factor of at least 1, got '2'"),
        ({"rope_type": "dynamic", "factor": float("inf")}, "a factor of at least 1, got inf"),
        ({**DYNAMIC, "beta_fast": 32}, "that the type 'dynamic' does not use: beta_fast; it takes"),
        ({**DYNAMIC, "rope_theta": 5e5}, "rope_theta 500000.0, and ChatGLM's .* 10000.0: leave it"),
        ({**DYNAMIC, "original_max_position_embeddings": 0}, r"\['original.* at least 1, got 0"),
        *(
            ({"rope_type": name, "factor": 4.0}, f"the type '{name}', and ChatGLM has 'linear' or")
            for name in ("yarn", "longrope", "llama3", "proportional", "su", "ntk")
        ),
    ],
)
def test_other_scalings_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatGLMConfig(rope_scaling=value)


def test_a_window_that_is_not_reached_or_not_meant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8192 beside a rope_scaling without original_max_.* say"):
        ChatGLMConfig(max_sequence_length=8192, rope_scaling=DYNAMIC)
    known = {**DYNAMIC, "original_max_position_embeddings": 2048}
    assert ChatGLMConfig(max_sequence_length=8192, rope_scaling=known).max_sequence_length == 8192
    assert ChatGLMConfig(max_sequence_length=5000, rope_scaling=known).max_sequence_length == 5000
    with pytest.raises(ValueError, match=r"16384 is beyond 8192, .* use a factor of 8\."):
        ChatGLMConfig(max_sequence_length=16384, rope_scaling=known)
    with pytest.raises(ValueError, match="are two names of one field; give one"):
        ChatGLMConfig(rope_scaling=LINEAR, rope_parameters=DYNAMIC)


def test_a_folder_is_loaded_with_it_and_remembers_it(tmp_path: Path) -> None:
    """As an argument of `from_pretrained`, saved, changed and taken away again."""
    first, second = tmp_path / "first", tmp_path / "second"
    build().save_pretrained(first)
    load = ChatGLMForConditionalGeneration.from_pretrained
    load(first, rope_scaling=DYNAMIC).save_pretrained(second)
    again = load(second)
    assert again.config.max_sequence_length == 4 * TRAINED
    ids = draw_prompt(40)
    assert torch.equal(read_at_once(again, ids), read_at_once(build(DYNAMIC), ids))
    assert not torch.equal(read_at_once(again, ids), read_at_once(build(), ids))
    config = load(second, rope_scaling={**LINEAR, "factor": 2.0}, max_sequence_length=20).config
    assert (config.rope_scaling["factor"], config.max_sequence_length) == (2.0, 20)
    plain = load(second, rope_scaling=None)
    assert plain.config.max_sequence_length == TRAINED
    assert torch.equal(read_at_once(plain, ids), read_at_once(build(), ids))
    with pytest.raises(ValueError, match=r"200 is beyond 64, .* use a factor of 12\.5"):
        load(first, rope_scaling=DYNAMIC, max_sequence_length=200)


@pytest.mark.parametrize("length", [1, 2048, 2049, 5000, 8192])
@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_frequencies_are_those_of_transformers(rope_type: str, length: int) -> None:
    """But for the rounding of the trained frequencies to half, which stays underneath."""
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "max_position_embeddings": 2048}
    peer = LlamaConfig(**sizes)
    peer.rope_parameters = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0}
    if not hasattr(peer, "standardize_rope_params"):  # transformers 4
        peer = LlamaConfig(**sizes, rope_scaling={"rope_type": rope_type, "factor": 4.0})
    expected, _ = ROPE_INIT_FUNCTIONS[rope_type](peer, torch.device("cpu"), seq_len=length)
    config = ChatGLMConfig(hidden_size=128, num_attention_heads=1, rope_scaling=None)
    config.rope_scaling = {"rope_type": rope_type, "factor": 4.0}
    # The position 0 takes no part in the turn, the position 1 turns by the frequency itself.
    places = torch.tensor([[[0, 1, length - 1], [0, 0, 0]]])
    cos, sin = RotaryEmbedding(config)(places, torch.float32)
    found = torch.atan2(sin, cos)[0, 0, 0, 1, :32]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("fields", [{}, ONE_AXIS], ids=["two axes", "one axis"])
def test_nothing_changes_within_the_trained_window(fields: dict[str, Any]) -> None:
    """To the last bit; and nothing at all by a linear factor of 1."""
    # With one axis `<sop>` takes a position of its own.
    plain, short, long = build(**fields), draw_prompt(TRAINED - len(fields)), draw_prompt(50)
    expected = read_at_once(plain, short)
    assert torch.equal(read_at_once(build(DYNAMIC, **fields), short), expected)
    assert not torch.equal(read_at_once(build(LINEAR, **fields), short), expected)
    same = build({**LINEAR, "factor": 1.0}, **fields)
    assert torch.equal(read_at_once(same, long), read_at_once(plain, long))


def test_the_row_that_grows_is_slowed() -> None:
    """A long prompt turns the first axis slower, a long answer the second, each for itself."""
    long, short = [0, 1, 2, 40], [0, 1, 2, 3]
    plain = build()
    for row, scaling in ((0, DYNAMIC), (1, DYNAMIC), (1, LINEAR)):
        places = [short, short]
        places[row] = long
        found, before = angles_of(build(scaling), places), angles_of(plain, places)
        assert found[row, 1] < before[row, 1]
        others = [before[1 - row], before[1 - row] / 4]
        torch.testing.assert_close(found[1 - row], others[scaling is LINEAR])
    found = angles_of(build(LINEAR), [long, short])
    torch.testing.assert_close(found, angles_of(plain, [[0, 0.25, 0.5, 10], short]))  # pyright: ignore


@pytest.mark.parametrize("scaling", [LINEAR, DYNAMIC], ids=["linear", "dynamic"])
@pytest.mark.parametrize(
    ("fields", "blank", "place"),
    # With one axis and [gMASK] the original counts on in a whole, and holds in steps.
    [({}, GMASK, -1), ({}, MASK, 5), (ONE_AXIS, MASK, 5)],
    ids=["gmask", "mask", "one axis"],
)
def test_steps_are_turned_as_the_whole(
    scaling: dict[str, Any], fields: dict[str, Any], blank: int, place: int
) -> None:
    """A prompt beyond the window: its keys in the cache and later queries turn alike."""
    model, ids = build(scaling, **fields), [*draw_prompt(40, blank, place), 30, 40, 50]
    whole = read_at_once(model, ids)[40:]
    torch.testing.assert_close(read_by_steps(model, ids, 40), whole, rtol=1e-4, atol=1e-4)
    with kernels_off():
        torch.testing.assert_close(read_by_steps(model, ids, 40), whole, rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_emptied_forgets() -> None:
    model = build(DYNAMIC)
    cache: Any = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        for length in (40, 8):
            cache.reset()
            ids = torch.tensor([draw_prompt(length)])
            found = model(ids, past_key_values=cache).logits
            torch.testing.assert_close(found[0], read_at_once(model, ids[0].tolist()))


def test_rows_are_not_changed_by_their_company() -> None:
    model, rows = build(DYNAMIC), [draw_prompt(40), draw_prompt(12)]
    padded = [[PAD] * (41 - len(row)) + row for row in rows]
    with torch.no_grad():
        together = model(torch.tensor(padded), attention_mask=torch.tensor(padded).ne(PAD).long())
    for row, logits in zip(rows, together.logits):
        alone = read_at_once(model, row)
        torch.testing.assert_close(logits[-len(row) :], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation_follows_the_whole(options: dict[str, Any]) -> None:
    """Behind a long prompt with the blank in its middle, the scores are those of full passes."""
    model, ids = build(DYNAMIC), torch.tensor([draw_prompt(40, MASK, 5)])
    settings = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": [BOS], **options}
    settings |= {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    expected = model.generate(ids, **{**settings, "use_cache": False, "cache_implementation": None})
    found = model.generate(ids, **settings)
    assert found.sequences.tolist() == expected.sequences.tolist()
    logits, truth = torch.stack(found.logits), torch.stack(expected.logits)
    torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{"pre_seq_len": 4}, {"quantization_bit": 8}])
def test_prefixes_and_packed_weights_have_it_too(fields: dict[str, Any], tmp_path: Path) -> None:
    plain = build(**{k: v for k, v in fields.items() if k == "pre_seq_len"})
    scaled = build(DYNAMIC, **{k: v for k, v in fields.items() if k == "pre_seq_len"})
    if "quantization_bit" in fields:
        plain, scaled = plain.quantize(8), scaled.quantize(8)
    short, long = draw_prompt(10), draw_prompt(40)
    assert torch.equal(read_at_once(plain, short), read_at_once(scaled, short))
    assert not torch.allclose(read_at_once(plain, long), read_at_once(scaled, long))
    scaled.save_pretrained(tmp_path)
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(read_at_once(again, long), read_at_once(scaled, long))


def test_a_quantized_folder_keeps_it(tiny_repo: Path, tmp_path: Path) -> None:
    main = import_from_package("chatglm.cli").main
    source = tmp_path / "source"
    shutil.copytree(tiny_repo, source)
    fields = json.loads((source / "config.json").read_text()) | {"rope_scaling": DYNAMIC}
    (source / "config.json").write_text(json.dumps(fields))
    assert main(["quantize", str(source), str(tmp_path / "packed"), "--bits", "8"]) == 0
    config = AutoConfig.from_pretrained(tmp_path / "packed", trust_remote_code=True)
    assert config.max_sequence_length == 4 * fields["max_sequence_length"]
    assert config.rope_scaling["rope_type"] == "dynamic"
