"""Answers to many prompts: the same by rows and by batches, for their seeds, in any company."""

import logging
from typing import Any

import pytest
import torch
from conftest import build_model, import_from_package
from peft import LoraConfig, get_peft_model

pytest.importorskip("chatglm", reason="needs the package")

from chatglm import answering
from chatglm.answering import answer_prompts, cut_answer, derive_seed, find_reasons, only_options
from chatglm.model_modules import import_model_module

PROMPTS = [[5, 6, 301, 304], [7] * 9 + [301, 304], [301, 304], [5, 6, 301, 304], [9, 8, 301, 304]]
SEEDS = [3, 4, 5, 6, 3]
END = 19
SAMPLED = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": [END, 236], "top_p": 0.9}


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(spread=5)


@pytest.fixture(autouse=True)
def forget_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell again what was told in another test; and short answers are rows here."""
    answering._tell_once.cache_clear()
    monkeypatch.setattr(answering, "SHORTEST", 1)


def in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "find_reasons", lambda *args: ["the test says so"])


needs_engine = pytest.mark.skipif(
    not import_from_package("chatglm.cpu.step_graph").can_run(), reason="no programs"
)


def test_answers_depend_on_seeds_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [
        answer_prompts(model, [prompt], SAMPLED, [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS)
    ]
    assert len({*map(tuple, alone)}) == len(PROMPTS)
    assert {len(ids) for ids in alone} > {12}, "some end, and some are cut off"
    assert all(ids[-1] in (END, 236) for ids in alone if len(ids) < 12)
    for size in (0, 1, 2, 3, 5):
        assert answer_prompts(model, PROMPTS, SAMPLED, SEEDS, size) == alone
    order = [4, 2, 0, 3, 1]
    turned = [PROMPTS[n] for n in order], SAMPLED, [SEEDS[n] for n in order]
    assert answer_prompts(model, *turned, 2) == [alone[n] for n in order]
    in_batches(monkeypatch)
    for size in (0, 1, 2, 3):
        assert answer_prompts(model, PROMPTS, SAMPLED, SEEDS, size) == alone


def test_without_seeds_torchs_generator_decides(model: Any) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(answer_prompts(model, PROMPTS, SAMPLED))
    assert found[0] == found[1] != found[2]


def test_greedy_answers_are_generates(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    expected = [
        model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    assert answer_prompts(model, PROMPTS, options, size=2) == expected
    in_batches(monkeypatch)
    assert answer_prompts(model, PROMPTS, options, size=2) == expected


@needs_engine
def test_rows_stay_as_many_as_wait(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a prompt that is there twice is read once."""
    decoding = import_model_module(model, "decoding_chatglm")
    counts: list[int] = []
    decode = decoding.decode_rows
    monkeypatch.setattr(
        decoding, "decode_rows", lambda m, rows: (counts.append(len(rows)), decode(m, rows))[1]
    )
    done: list[int] = []
    answers = answer_prompts(model, PROMPTS, SAMPLED, SEEDS, 3, done.append)
    assert sum(counts) == sum(len(ids) - 1 for ids in answers)
    full = counts.index(3)
    still = [count for count in counts[full:] if count == 3]
    assert counts[full : full + len(still)] == still, "fewer only when nobody waits"
    assert sum(done) == len(PROMPTS)


@needs_engine
def test_short_answers_are_decoded_in_batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "SHORTEST", 32)
    for most, count in ((31, 1), (32, 0), (None, 0)):
        assert len(find_reasons(model, {"max_new_tokens": most})) == count
    assert find_reasons(model, SAMPLED) == ["a batch is faster for answers of 12 tokens or fewer"]


@needs_engine
def test_reasons_for_batches_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model()
    assert find_reasons(model, SAMPLED) == []
    assert find_reasons(model, {"num_beams": 2}) == ["rows do not know num_beams"]
    with torch.autocast("cpu", torch.bfloat16):
        assert find_reasons(model, {}) == ["a batch is faster under autocast"]
    environment = import_model_module(model, "environment_chatglm")
    with environment.kernels_off():
        assert find_reasons(model, {}) == ["a batch is faster without the engine"]
    hook = model.transformer.layers[0].register_forward_hook(lambda *args: None)
    assert "adapters, prefixes, hooks" in find_reasons(model, {})[0]
    hook.remove()
    assert find_reasons(model, {}) == []
    with caplog.at_level(logging.WARNING, "chatglm"):
        for _ in range(2):
            answer_prompts(model, PROMPTS[:2], {"num_beams": 2, "max_new_tokens": 3})
    assert [record.getMessage() for record in caplog.records] == [
        "Answers are decoded by generate() in padded batches, not as rows: rows do not know "
        "num_beams."
    ]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is dep:FutureWarning")
def test_adapters_answer_in_batches_with_the_same_seeds() -> None:
    model = build_model(spread=5)
    config = LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    expected = answer_prompts(model, PROMPTS, SAMPLED, SEEDS)
    adapted = get_peft_model(model, config).eval()  # which change nothing yet
    assert find_reasons(adapted, SAMPLED) and find_reasons(adapted.get_base_model(), SAMPLED)
    for outer in (adapted, adapted.get_base_model()):
        assert answer_prompts(outer, PROMPTS, SAMPLED, SEEDS, 2) == expected


def test_what_a_folder_says_holds_unless_it_is_replaced(model: Any) -> None:
    own = model.generation_config
    with only_options(model, {"eos_token_id": END, "suppress_tokens": [104]}):
        held = answer_prompts(model, PROMPTS, {"max_new_tokens": 12, "do_sample": False})
    assert model.generation_config is own
    assert not any(104 in ids for ids in held)
    with only_options(model, {"eos_token_id": END}):
        assert held != answer_prompts(model, PROMPTS, {"max_new_tokens": 12, "do_sample": False})


def test_an_error_of_a_processor_is_the_callers(model: Any) -> None:
    def refuse(row: int, ids: Any) -> list[int]:
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        answer_prompts(model, PROMPTS, {**SAMPLED, "prefix_allowed_tokens_fn": refuse})


def test_seeds_are_one_a_prompt(model: Any) -> None:
    assert answer_prompts(model, [], SAMPLED) == []
    with pytest.raises(ValueError, match="5 prompts need as many seeds, got 2"):
        answer_prompts(model, PROMPTS, SAMPLED, [1, 2])


def test_a_place_has_a_seed_of_its_own() -> None:
    places = [(seed, step, number) for seed in range(3) for step in range(3) for number in range(3)]
    seeds = [derive_seed(*place) for place in places]
    assert len({*seeds}) == len(places) and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2, 3) == 6498626229777268288


def test_an_answer_is_cut_behind_its_first_end() -> None:
    assert cut_answer([5, 9, 6, 9, 3], [9]) == [5, 9]
    assert cut_answer([5, 8, 6, 9, 3], [9, 8]) == [5, 8]
    assert cut_answer([5, 6], [9]) == [5, 6] and cut_answer([5], []) == [5]
