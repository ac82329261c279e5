"""`generate` and `stream_generate`: every way to decode, every kind of batch."""

import gc
import json
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from chatglm_6b.masking_chatglm import build_geometry
from conftest import SHARED, build_model, pad_rows
from golden_model import load_arrays, load_model
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

LATE = SHARED / "golden" / "model_late"
PAD, MASK, GMASK, SOP, EOP = 3, 300, 301, 304, 305
PROMPTS = [
    [5, 197, 86, 97, 275, GMASK, SOP],
    [115, 98, MASK, 242, SOP],
    [7, MASK, 43, 44, GMASK, SOP],
    [GMASK, SOP],
    [8, 9, GMASK, SOP, 20, 21],
]
GREEDY = {"max_new_tokens": 8, "do_sample": False}
DECODERS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


@cache
def shared_model() -> Any:
    return build_model(spread=5)


@pytest.fixture
def model() -> Any:
    """One model for all tests; they do not change it."""
    return shared_model()


@cache
def answer_alone(prompt: int, decoder: str = "greedy") -> list[list[int]]:
    """Return what a decoder answers to one of the prompts without any padding."""
    row = PROMPTS[prompt]
    outputs = generate(shared_model(), [row], **DECODERS[decoder])
    return [output[len(row) :] for output in outputs]


def generate(model: Any, rows: list[list[int]], **options: Any) -> list[list[int]]:
    return model.generate(torch.tensor(rows), **{**GREEDY, **options}).tolist()


def test_the_tiny_model_says_something() -> None:
    """Equal answers below would mean little if they were all the same."""
    answers = [answer_alone(i)[0] for i in range(len(PROMPTS))]
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)
    assert all(len(set(answer)) > 3 for answer in answers), answers


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_answer_as_they_do_alone(model: Any, side: str, decoder: str) -> None:
    options = DECODERS[decoder]
    copies = options.get("num_return_sequences", 1)
    ids = torch.tensor(pad_rows(PROMPTS, side))
    outputs = model.generate(ids, attention_mask=(ids != PAD).long(), **GREEDY, **options)
    for i in range(len(PROMPTS)):
        rows = outputs[i * copies : (i + 1) * copies, ids.shape[1] :].tolist()
        for answer, expected in zip(rows, answer_alone(i, decoder)):
            assert answer[: len(expected)] == expected
            assert set(answer[len(expected) :]) <= {PAD}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, None], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_masks_of_any_kind(model: Any, side: str, dtype: Any) -> None:
    """Without a mask, pads are told by their id."""
    ids = torch.tensor(pad_rows(PROMPTS, side))
    mask = None if dtype is None else (ids != PAD).to(dtype)
    expected = model.generate(ids, attention_mask=(ids != PAD).long(), **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    if mask is not None:
        hidden = build_geometry(ids, mask, model.transformer.special_ids).attention_mask
        for legacy in (hidden, hidden[:, 0], hidden * -1e4):
            assert torch.equal(model.generate(ids, attention_mask=legacy, **GREEDY), expected)


def test_right_padded_rows_come_back_shifted(model: Any) -> None:
    ids = torch.tensor([[5, GMASK, SOP, PAD], [5, 6, GMASK, SOP]])
    outputs = model.generate(ids, attention_mask=(ids != PAD).long(), **GREEDY)
    assert outputs[:, :4].tolist() == [[PAD, 5, GMASK, SOP], [5, 6, GMASK, SOP]]
    named = model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), **GREEDY)
    assert torch.equal(named, outputs)


@pytest.mark.parametrize(
    "row", [[5, 6, 7], [5, GMASK], [5, SOP], [MASK], [SOP, GMASK], [PAD, PAD]], ids=str
)
def test_strange_prompts_are_answered(model: Any, row: list[int]) -> None:
    for options in DECODERS.values():
        assert len(generate(model, [row], **options)[0]) > len(row)
    mask = torch.zeros(1, len(row), dtype=torch.long)
    assert model.generate(torch.tensor([row]), attention_mask=mask, **GREEDY).shape[0] == 1


# --- several tokens a step


def assistant(seed: int = 0, **fields: Any) -> Any:
    """A model that drafts four tokens at a time; by default the model itself, always right."""
    helper = build_model(seed=seed, spread=5, **fields)
    helper.generation_config.num_assistant_tokens = 4
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.assistant_confidence_threshold = 0.0
    return helper


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_assisted_decoding_is_greedy_decoding(model: Any, prompt: int) -> None:
    row = PROMPTS[prompt]
    for helper in (assistant(), assistant(seed=1, num_layers=1)):
        assert generate(model, [row], assistant_model=helper) == [row + answer_alone(prompt)[0]]


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_prompt_lookup_is_greedy_decoding(model: Any, prompt: int) -> None:
    """The prompt repeats an answer, so that drafts are found; most of them are rejected."""
    answer = answer_alone(prompt)[0]
    row = [*answer[:6], 11, *answer[3:8], *PROMPTS[prompt]]
    expected = generate(model, [row], max_new_tokens=16)
    assert generate(model, [row], max_new_tokens=16, prompt_lookup_num_tokens=3) == expected


def test_drafts_are_checked_several_at_a_time(model: Any) -> None:
    widths = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    try:
        generate(model, [PROMPTS[0]], assistant_model=assistant())
    finally:
        hook.remove()
    assert max(widths) > 1
    assert len(widths) < GREEDY["max_new_tokens"]


# --- other inputs


def test_embedded_prompts(model: Any) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    embeddings = model.get_input_embeddings()(prompt)
    expected = model.generate(prompt, **GREEDY)
    both = model.generate(prompt, inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(both, expected)
    named = model.generate(input_ids=prompt, inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(named, expected)
    geometry = build_geometry(prompt, None, model.transformer.special_ids)
    placed = model.generate(inputs_embeds=embeddings, position_ids=geometry.position_ids, **GREEDY)
    assert torch.equal(placed, expected[:, prompt.shape[1] :])
    alone = model.generate(inputs_embeds=embeddings, **GREEDY)
    assert alone.shape == (1, GREEDY["max_new_tokens"])  # all is context, nothing is refused
    beams = model.generate(inputs_embeds=embeddings.repeat(2, 1, 1), num_beams=2, **GREEDY)
    assert torch.equal(beams[0], beams[1])


def test_embedded_prompts_need_a_cache(model: Any) -> None:
    embeddings = model.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
    with pytest.raises(ValueError, match="inputs_embeds need use_cache=True"):
        model.generate(inputs_embeds=embeddings, use_cache=False, **GREEDY)


def test_options_in_one_object(model: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    config = GenerationConfig(**GREEDY, pad_token_id=PAD, eos_token_id=EOP)
    assert torch.equal(model.generate(ids, config), model.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"prefill_chunk_size": 4}, "Chunked prefill"),
        ({"cache_implementation": "paged"}, "paged"),
    ],
)
def test_causal_prefill_is_refused(model: Any, option: dict[str, Any], words: str) -> None:
    ids = torch.tensor([PROMPTS[0]])
    config = GenerationConfig(**GREEDY)
    for name, value in option.items():
        setattr(config, name, value)
    calls: list[Any] = [
        lambda: model.generate(ids, **GREEDY, **option),
        lambda: model.generate(ids, generation_config=config),
        lambda: model.generate(ids, config),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{words}.*both directions.*padded batches"):
            call()


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused(model: Any, name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"Continuous batching.*padded batches"):
        getattr(model, name)([PROMPTS[0]])


# --- what the original gave for padded batches


@pytest.mark.skipif(not LATE.exists(), reason="needs ../shared/golden")
@pytest.mark.parametrize("case", ["batch_greedy", "batch_greedy_nocache", "batch_beam4"])
@pytest.mark.parametrize("name", ["tiny2d", "prefix"])
def test_batches_of_the_original(name: str, case: str) -> None:
    """With its own mask and positions, which count from [MASK] where a row has both masks."""
    model = load_model(LATE, name)
    run = json.loads((LATE / f"{name}.json").read_text())["generate"][case]
    inputs = original_inputs(torch.tensor(run["input_ids"]), load_arrays(LATE, name))
    outputs = model.generate(torch.tensor(run["input_ids"]), **{**run["kwargs"], **inputs})
    assert outputs.tolist() == run["output"]


@pytest.mark.skipif(not LATE.exists(), reason="needs ../shared/golden")
def test_streamed_batches_of_the_original() -> None:
    model = load_model(LATE, "tiny2d")
    facts = json.loads((LATE / "tiny2d.json").read_text())["generate"]
    ids = torch.tensor(facts["batch_greedy"]["input_ids"])
    inputs = original_inputs(ids, load_arrays(LATE, "tiny2d"))
    expected = facts["batch_stream"]
    rows = list(model.stream_generate(ids, max_new_tokens=8, do_sample=False, **inputs))
    assert len(rows) == expected["n_yields"] + 1  # the original leaves out the last token
    assert rows[expected["n_yields"] - 1].tolist() == expected["last"]


def original_inputs(ids: torch.Tensor, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut the inputs of the golden batch, padded to 13 columns, to those of `ids`."""
    places = slice(arrays["batch/input_ids"].shape[1] - ids.shape[1], None)
    rows = slice(ids.shape[0])
    assert torch.equal(arrays["batch/input_ids"][rows, places], ids)
    return {
        "attention_mask": arrays["batch/attention_mask"][rows, :, places, places],
        "position_ids": arrays["batch/position_ids"][rows, :, places],
    }


def test_one_axis_models_cache_in_any_case() -> None:
    """What they compute depends on it, and the original did; their own positions count on too."""
    model = build_model(spread=5, position_encoding_2d=False)
    ids = torch.tensor([PROMPTS[0]])
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)
    places = build_geometry(ids, None, model.transformer.special_ids, num_positions=1).position_ids
    blank = PROMPTS[0].index(GMASK)
    assert places[0, 0, -1] == blank + 1  # from where on `continue_position_ids` holds
    held = torch.cat((places[:, 0, :-1], torch.tensor([[blank]])), dim=1)
    step = model.generate(ids, position_ids=held, **GREEDY)
    assert step.shape == expected.shape and not torch.equal(step, expected)


def test_several_answers_to_a_prompt_with_positions(model: Any) -> None:
    ids = torch.tensor([PROMPTS[2]])
    geometry = build_geometry(ids, None, model.transformer.special_ids)
    options = {"num_beams": 4, "num_return_sequences": 3}
    expected = model.generate(ids, **GREEDY, **options)
    for kind in ({}, {"cache_implementation": "static"}):
        outputs = model.generate(ids, **geometry._asdict(), **GREEDY, **options, **kind)
        assert torch.equal(outputs, expected)


# --- streams


@pytest.fixture
def threads() -> Iterator[set[threading.Thread]]:
    """The threads there were; a test that leaves one more fails."""
    before = set(threading.enumerate())
    yield before
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_a_stream_yields_every_token(model: Any, threads: Any) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    expected = model.generate(prompt, **GREEDY)
    rows = list(model.stream_generate(prompt, **GREEDY))
    lengths = range(prompt.shape[1] + 1, expected.shape[1] + 1)
    assert [row.tolist() for row in rows] == [expected[:, :n].tolist() for n in lengths]
    by_config = model.stream_generate(prompt, GenerationConfig(**GREEDY, eos_token_id=EOP))
    assert torch.equal(list(by_config)[-1], expected)


@pytest.mark.parametrize(
    "form",
    [int, lambda i: [i, EOP], lambda i: torch.tensor([i])],
    ids=["number", "list", "tensor"],
)
def test_an_end_token_is_not_yielded(model: Any, threads: Any, form: Any) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    answer = model.generate(prompt, **GREEDY)[0, prompt.shape[1] :].tolist()
    end = next(token for i, token in enumerate(answer) if i > 2 and token not in answer[:i])
    rows = list(model.stream_generate(prompt, **GREEDY, eos_token_id=form(end)))
    assert len(rows) == answer.index(end)
    assert rows[-1][0, prompt.shape[1] :].tolist() == answer[: answer.index(end)]


def test_a_stream_finds_the_end_token_wherever_it_is_set() -> None:
    prompt = torch.tensor([PROMPTS[0]])
    answer = answer_alone(0)[0]
    end = next(token for i, token in enumerate(answer) if i > 2 and token not in answer[:i])
    model = build_model(spread=5)
    model.generation_config.eos_token_id = [end, EOP]
    for config in (None, GenerationConfig(**GREEDY)):
        rows = list(model.stream_generate(prompt, config, **GREEDY))
        assert len(rows) == answer.index(end)
    model.generation_config.eos_token_id = None
    assert len(list(model.stream_generate(prompt, **GREEDY))) == GREEDY["max_new_tokens"]


def test_a_stream_of_rows_goes_on_until_the_last_ends(model: Any, threads: Any) -> None:
    ids = torch.tensor(pad_rows(PROMPTS, "right"))[:3]
    answers = model.generate(ids, **GREEDY)[:, ids.shape[1] :]
    end = int(answers[0, 4])
    rows = list(model.stream_generate(ids, **GREEDY, eos_token_id=end))
    expected = model.generate(ids, **GREEDY, eos_token_id=end)
    assert torch.equal(rows[-1], expected[:, : rows[-1].shape[1]])
    assert torch.equal(rows[0][:, : ids.shape[1]], expected[:, : ids.shape[1]])


def test_a_stream_of_drafts_yields_token_by_token(model: Any, threads: Any) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    expected = model.generate(prompt, **GREEDY)
    rows = list(model.stream_generate(prompt, assistant_model=assistant(), **GREEDY))
    assert [row.shape[1] for row in rows] == [*range(prompt.shape[1] + 1, expected.shape[1] + 1)]
    assert torch.equal(rows[-1], expected)


def test_a_stream_stops_where_it_is_told_to(model: Any, threads: Any) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    criteria = StoppingCriteriaList([MaxLengthCriteria(prompt.shape[1] + 4)])
    assert len(list(model.stream_generate(prompt, stopping_criteria=criteria, **GREEDY))) == 4
    assert len(criteria) == 1


class Breaking(LogitsProcessor):
    """Breaks at a length, or counts the passes."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if input_ids.shape[1] == self.length:
            raise ArithmeticError("the processor broke")
        return scores


def test_closing_a_stream_ends_its_thread(model: Any, threads: set[threading.Thread]) -> None:
    counter = Breaking(-1)
    prompt = torch.tensor([PROMPTS[0]])
    options = {**GREEDY, "max_new_tokens": 2000}
    stream = model.stream_generate(
        prompt, logits_processor=LogitsProcessorList([counter]), **options
    )
    assert set(threading.enumerate()) == threads  # nothing runs before it is asked for
    next(stream)
    next(stream)
    assert set(threading.enumerate()) != threads
    stream.close()
    assert set(threading.enumerate()) == threads
    assert counter.calls < 1000
    for _ in model.stream_generate(prompt, **options):
        break  # dropping a stream closes it


def test_an_error_reaches_who_listens(model: Any, threads: Any) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    processors = LogitsProcessorList([Breaking(prompt.shape[1] + 2)])
    seen = []
    with pytest.raises(ArithmeticError, match="the processor broke"):
        for row in model.stream_generate(prompt, logits_processor=processors, **GREEDY):
            seen.append(row)
    assert len(seen) == 2
    with pytest.raises(ValueError, match="no_such_option"):
        next(model.stream_generate(prompt, no_such_option=1, **GREEDY))
