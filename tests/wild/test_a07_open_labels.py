"""A7: labels in what is read in both directions, each seen by the token that has to foresee it.

Their loss is that of a copy, and nobody was told.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chatglm_6b.environment_chatglm import CACHE_NAME
from chatglm_6b.scoring_chatglm import find_open_labels
from conftest import TINY, build_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor

GMASK, SOP, PAD = TINY["gmask_token_id"], TINY["bos_token_id"], TINY["pad_token_id"]
RAW = torch.tensor([[5, 9, 7, 8, 11, 12]])
PROMPT = torch.tensor([[5, 9, GMASK, SOP, 11, 12]])
ANSWER = torch.tensor([[-100, -100, -100, -100, 11, 12]])
WORDS = r"labels stand in what ChatGLM reads in both directions.*\[gMASK\] and <sop> before"
old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture
def model() -> Any:
    return build_model()


def is_seen(model: Any, ids: Tensor, column: int) -> bool:
    """Whether the token before a column can tell what stands there: its logits change with it."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        before = model(ids, inputs_embeds=embeddings).logits
        embeddings[0, column] = embeddings[0, column].flip(0)
        after = model(ids, inputs_embeds=embeddings).logits
    return bool((before - after)[0, column - 1].abs().max() > 1e-4)


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        (RAW, RAW),
        (PROMPT, PROMPT),
        (PROMPT, torch.tensor([[-100, 9, -100, -100, 11, 12]])),
        (torch.tensor([[PAD, PAD, 5, 9, 7, 8]]), torch.tensor([[-100, -100, 5, 9, 7, 8]])),
        (torch.cat((PROMPT, RAW)), torch.cat((ANSWER, RAW))),
    ],
    ids=["no <sop>", "whole rows", "one of the question", "pads before", "one row of two"],
)
def test_a_label_that_is_seen_is_told_of_once(model: Any, ids: Tensor, labels: Tensor) -> None:
    with pytest.warns(RuntimeWarning, match=WORDS):
        loss = model(ids, labels=labels).loss
    assert loss.isfinite()
    assert model(ids, labels=labels).loss.equal(loss)  # warnings are errors here


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        (PROMPT, ANSWER),
        (PROMPT, torch.tensor([[-100, -100, -100, SOP, 11, 12]])),  # as the official trainer has it
        (torch.tensor([[GMASK, SOP, 9, 7, 8]]), torch.tensor([[GMASK, SOP, 9, 7, 8]])),
        (torch.tensor([[SOP, 9, 7, 8]]), torch.tensor([[SOP, 9, 7, 8]])),
        (torch.tensor([[5, GMASK, SOP, 9, PAD]]), torch.tensor([[-100, -100, -100, 9, -100]])),
    ],
    ids=["the answer", "<sop> too", "a text alone", "without [gMASK]", "pads behind"],
)
def test_labels_that_are_not_seen_are_no_matter(model: Any, ids: Tensor, labels: Tensor) -> None:
    assert model(ids, labels=labels).loss.isfinite()
    columns = [c for c in range(1, ids.shape[1]) if labels[0, c] != -100]
    assert not any(is_seen(model, ids, column) for column in columns)


def test_the_count_is_of_what_logits_depend_on(model: Any) -> None:
    for ids in (RAW, PROMPT):
        with pytest.warns(RuntimeWarning) as told:
            build_model()(ids, labels=ids)
        seen = sum(is_seen(model, ids, column) for column in range(1, 6))
        assert str(told[0].message).startswith(f"{seen} labels")


def test_masks_and_documents_of_a_caller_decide(model: Any) -> None:
    """A causal mask makes of any row one that can be scored, and an open one of none."""
    causal = torch.ones(1, 1, 6, 6).triu(1).bool()
    positions = torch.arange(6).expand(1, 2, 6)
    model(RAW, attention_mask=causal, position_ids=positions, labels=RAW)
    row = torch.tensor([[5, GMASK, SOP, 9, 7, 8, GMASK, SOP, 11, 12]])
    documents = torch.tensor([[0] * 4 + [1] * 6])
    positions, mask = model.locate_documents(row, documents)
    learned = torch.tensor([[-100, -100, -100, 9, -100, -100, -100, -100, 11, 12]])
    model(row, attention_mask=mask, position_ids=positions, labels=learned)
    learned[0, 5] = 8  # of the second question, behind the first <sop>
    with pytest.warns(RuntimeWarning, match=f"^1 {WORDS}"):
        model(row, attention_mask=mask, position_ids=positions, labels=learned)


def test_new_tokens_behind_a_cache_look_back_only(model: Any) -> None:
    cache = model(RAW[:, :2])[CACHE_NAME]
    assert model(RAW[:, 2:], labels=RAW[:, 2:], past_key_values=cache).loss.isfinite()


def test_embeddings_without_ids_are_all_context(model: Any) -> None:
    embeddings = model.get_input_embeddings()(PROMPT).detach()
    model(PROMPT, inputs_embeds=embeddings, labels=ANSWER)
    with pytest.warns(RuntimeWarning, match=WORDS):
        model(inputs_embeds=embeddings, labels=ANSWER)


@old_name
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_adapters_are_trained_without_a_word_on_answers_alone(model: Any, kind: str) -> None:
    lora = LoraConfig(r=2, target_modules=["query_key_value"])
    prefix = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=3, token_dim=64,
        num_attention_heads=4, num_transformer_submodules=1,
    )  # fmt: skip
    wrapped = get_peft_model(model, lora if kind == "lora" else prefix)
    wrapped(PROMPT, labels=ANSWER).loss.backward()
    with pytest.warns(RuntimeWarning, match=WORDS):
        wrapped(PROMPT, labels=PROMPT)


def test_graphs_do_not_ask(model: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(RAW, labels=RAW, use_cache=False).loss.isfinite()
    options = {"use_cache": False, "labels": RAW}
    torch.export.export(build_model(), (RAW,), options, strict=False)


class OnGPU(Tensor):
    """Labels that say that they are on a GPU."""

    @property
    def device(self) -> Any:
        return torch.device("cuda")


def test_a_gpu_is_waited_for_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def count(find: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: asked.append(1) or find(*args)

    module = model.transformer.forward.__wrapped__.__globals__["watch_labels"].__globals__
    monkeypatch.setitem(module, "find_open_labels", count(find_open_labels))
    for _ in range(3):
        model(PROMPT, labels=ANSWER)
    assert len(asked) == 3
    for _ in range(3):
        model(PROMPT, labels=ANSWER.as_subclass(OnGPU))
    assert len(asked) == 4


def test_who_wants_no_word_says_so(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert model(RAW, labels=RAW).loss.isfinite()
