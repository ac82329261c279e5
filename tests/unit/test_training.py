"""Losses, gradients, checkpointing, prefixes, adapters and the classifier."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from torch.nn.functional import cross_entropy, mse_loss

# Transformers 5.23 has new names for checkpointing; users and peft still say the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

PAD, GMASK, SOP, EOP = 3, 301, 304, 305
ROWS = torch.tensor(
    [
        [5, 197, 86, 97, GMASK, SOP, 20, 21, EOP],
        [7, 8, GMASK, SOP, 22, EOP, PAD, PAD, PAD],
    ]
)
LABELS = ROWS.masked_fill((ROWS == SOP).cumsum(1) == 0, -100).masked_fill(ROWS == PAD, -100)
LABELS = LABELS.masked_fill(ROWS == SOP, -100)
BATCH = {"input_ids": ROWS, "labels": LABELS}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: Any, steps: int = 3, **batch: Any) -> list[float]:
    """Return the losses of a few steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(**(batch or BATCH)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_loss_is_shifted_cross_entropy(tiny_model: Any) -> None:
    outputs = tiny_model(**BATCH)
    places = [(0, 6, 20), (0, 7, 21), (0, 8, EOP), (1, 4, 22), (1, 5, EOP)]
    log_probs = outputs.logits.double().log_softmax(-1)
    expected = -sum(log_probs[row, place - 1, token] for row, place, token in places) / len(places)
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert outputs.loss.dtype == torch.float32
    loss, logits, _ = tiny_model(**BATCH, return_dict=False)
    assert (loss, logits.shape) == (outputs.loss, outputs.logits.shape)


@pytest.mark.parametrize("counted", [None, 40], ids=["mean", "sum"])
def test_the_loss_of_learned_places_is_the_whole_one(tiny_model: Any, counted: int | None) -> None:
    learned = torch.nn.functional.pad(LABELS[:, 1:] != -100, (0, 1))
    found = []
    for places in (0, learned):
        tiny_model.zero_grad()
        output = tiny_model(**BATCH, num_items_in_batch=counted, logits_to_keep=places)
        output.loss.backward()
        found.append((output.loss, gradients(tiny_model)))
    (whole, expected), (loss, grads) = found
    torch.testing.assert_close(loss, whole)
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient.clone(), msg=name)


def test_the_loss_of_kept_columns_is_theirs(tiny_model: Any) -> None:
    logits = tiny_model(ROWS).logits[:, -4:-1]
    loss = tiny_model(**BATCH, logits_to_keep=4).loss
    expected = cross_entropy(logits.flatten(0, 1), LABELS[:, -3:].flatten())
    torch.testing.assert_close(loss, expected)


def test_the_loss_of_half_precision_is_float32(tiny_model: Any) -> None:
    expected = tiny_model(**BATCH).loss.item()
    loss = tiny_model.bfloat16()(**BATCH).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.05)


def test_accumulated_batches_count_their_tokens(tiny_model: Any) -> None:
    """Trainer hands over the number of items of the whole step; a mean would weigh rows wrongly."""
    loss = tiny_model(**BATCH).loss
    parts = [
        tiny_model(input_ids=ROWS[i : i + 1], labels=LABELS[i : i + 1], num_items_in_batch=5).loss
        for i in range(2)
    ]
    assert sum(parts).item() == pytest.approx(loss.item(), rel=1e-5)


def test_right_pads_need_no_mask(tiny_model: Any) -> None:
    """The official trainer passes ids and labels only."""
    mask = (ROWS != PAD).long()
    assert torch.allclose(tiny_model(**BATCH).loss, tiny_model(**BATCH, attention_mask=mask).loss)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("pre_seq_len", [None, 4])
def test_checkpointing_changes_nothing(pre_seq_len: int | None, reentrant: bool) -> None:
    plain, model = (build_model(pre_seq_len=pre_seq_len) for _ in range(2))
    for each in (plain, model):
        each.train()
        if pre_seq_len is not None:
            each.transformer.prefix_encoder.dropout.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    losses = [each(**BATCH).loss for each in (plain, model)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    expected, actual = gradients(plain), gradients(model)
    assert set(actual) == set(expected)
    for name, grad in expected.items():
        assert torch.allclose(actual[name], grad, rtol=1e-4, atol=1e-6), name
    if pre_seq_len is not None:
        assert expected["transformer.prefix_encoder.embedding.weight"].abs().max() > 0


def test_checkpointing_builds_no_cache() -> None:
    model = build_model().train()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert model(ROWS).past_key_values is None
    assert model.eval()(ROWS).past_key_values is not None


def test_checkpointing_saves_activations(tiny_model: Any) -> None:
    def count_saved() -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            tiny_model(**BATCH)
        return sum(saved)

    tiny_model.train()
    plain = count_saved()
    tiny_model.gradient_checkpointing_enable()
    assert count_saved() < plain / 2


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_prefix_freezes_all_else(projection: bool, tied: bool) -> None:
    model = build_model(
        pre_seq_len=4, prefix_projection=projection, tie_word_embeddings=tied
    ).train()
    model.transformer.prefix_encoder.dropout.p = 0.0
    names = trainable(model)
    assert {n for n in names if "prefix_encoder" not in n} == (
        set() if tied else {"lm_head.weight"}
    )
    assert len(names) == (5 if projection else 1) + (not tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, steps=5)
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == names


def test_a_prefix_drops_out_in_training_only() -> None:
    model = build_model(pre_seq_len=4)
    assert torch.equal(model(ROWS).logits, model(ROWS).logits)
    model.train()
    assert not torch.equal(model(ROWS).logits, model(ROWS).logits)


def test_a_prefix_in_float32_beside_a_half_model() -> None:
    """As the official trainer sets it up."""
    model = build_model(pre_seq_len=4).bfloat16().train()
    model.transformer.prefix_encoder.float()
    model(**BATCH).loss.backward()
    grad = model.transformer.prefix_encoder.embedding.weight.grad
    assert grad.dtype == torch.float32
    assert grad.isfinite().all() and grad.abs().max() > 0


# --- the classifier


def classifier(**fields: Any) -> Any:
    return build_model("ChatGLMForSequenceClassification", **fields)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_row_is_scored_at_its_last_token(num_labels: int, masked: bool) -> None:
    model = classifier(num_labels=num_labels)
    row = ROWS[1, :6].tolist()
    expected = model(torch.tensor([row])).logits
    assert expected.shape == (1, num_labels)
    states = model.transformer(torch.tensor([row])).last_hidden_state
    assert torch.allclose(expected, model.score(states[:, -1]))
    for before, after in ((3, 0), (0, 3), (1, 2)):
        ids = torch.tensor([[PAD] * before + row + [PAD] * after, ROWS[0].tolist()])
        mask = {"attention_mask": (ids != PAD).long()} if masked else {}
        assert torch.allclose(model(ids, **mask).logits[:1], expected, atol=1e-5)


def test_scoring_is_total() -> None:
    model = classifier()
    assert model(torch.full((2, 3), PAD)).logits.isfinite().all()
    embeddings = model.get_input_embeddings()(ROWS[:1])
    assert torch.allclose(
        model(inputs_embeds=embeddings, input_ids=ROWS[:1]).logits, model(ROWS[:1]).logits
    )
    assert model(inputs_embeds=embeddings).logits.shape == (1, 2)


def test_losses_of_the_classifier() -> None:
    classes = torch.tensor([2, 0])
    model = classifier(num_labels=3)
    outputs = model(ROWS, labels=classes)
    assert torch.allclose(outputs.loss, cross_entropy(outputs.logits, classes))
    targets = torch.tensor([0.5, -1.0])
    model = classifier(num_labels=1)
    outputs = model(ROWS, labels=targets)
    assert torch.allclose(outputs.loss, mse_loss(outputs.logits[:, 0], targets))
    model = classifier(num_labels=2, problem_type="multi_label_classification")
    outputs = model(ROWS, labels=torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert outputs.loss.item() > 0
    loss, logits, _ = model(ROWS, labels=torch.ones(2, 2), return_dict=False)
    assert (loss.dim(), logits.shape) == (0, (2, 2))


def test_the_classifier_learns() -> None:
    model = classifier(num_labels=2).train()
    model.gradient_checkpointing_enable()
    losses = train(model, steps=5, input_ids=ROWS, labels=torch.tensor([0, 1]))
    assert losses[-1] < losses[0]


# --- embeddings and head


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_keeps_the_tie(tied: bool) -> None:
    model = build_model(tie_word_embeddings=tied)
    with torch.no_grad():
        expected = model(ROWS).logits
    model.resize_token_embeddings(330, mean_resizing=False)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight.shape == embeddings.weight.shape == (330, 64)
    assert (head.weight is embeddings.weight) is tied
    assert model.config.vocab_size == 330
    with torch.no_grad():
        assert torch.equal(model(ROWS).logits[..., :320], expected)
    assert model(torch.tensor([[5, 325, GMASK, SOP]])).logits.shape[-1] == 330
    model(**BATCH).loss.backward()
    assert embeddings.weight.grad.shape == (330, 64)


def test_embeddings_and_head_can_be_replaced(tiny_model: Any) -> None:
    for model in (tiny_model, tiny_model.transformer, classifier()):
        table = torch.nn.Embedding(400, 64)
        model.set_input_embeddings(table)
        assert model.get_input_embeddings() is table
    head = torch.nn.Linear(64, 400, bias=False)
    tiny_model.set_output_embeddings(head)
    assert tiny_model.get_output_embeddings() is head
    assert tiny_model(ROWS).logits.shape[-1] == 400


# --- peft


@pytest.fixture
def lora() -> Iterator[Any]:
    model = get_peft_model(build_model(), LoraConfig(task_type=TaskType.CAUSAL_LM, r=2))
    yield model


def test_lora_finds_its_layers(lora: Any) -> None:
    """peft knows model_type "chatglm" and its official names."""
    adapted = {name.split(".lora_")[0] for name in trainable(lora)}
    assert len(adapted) == 3
    assert all(name.endswith("attention.query_key_value") for name in adapted)


def test_lora_trains_and_comes_back(lora: Any, tmp_path: Path) -> None:
    lora.gradient_checkpointing_enable()
    lora.enable_input_require_grads()
    losses = train(lora.train(), steps=4)
    assert losses[-1] < losses[0]
    expected = lora.eval()(ROWS).logits
    assert not torch.allclose(expected, build_model()(ROWS).logits, atol=1e-4)
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model(), str(tmp_path))
    assert torch.allclose(loaded(ROWS).logits, expected, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False}
    ids = loaded.generate(input_ids=ROWS[:1, :6], **options)
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(ROWS).logits, expected, atol=1e-4)
    assert torch.equal(merged.generate(ROWS[:1, :6], **options), ids)


def test_peft_prefix_tuning() -> None:
    """The same prefix as our own, which the golden data vouch for, gives the same numbers."""
    ours = build_model(pre_seq_len=4)
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    base = build_model()
    base.load_state_dict(ours.state_dict(), strict=False)
    theirs = get_peft_model(base, config).eval()
    states = ours.transformer.prefix_encoder.embedding.weight
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(states)
    ids = torch.tensor([ROWS[0, :6].tolist(), [PAD, PAD, *ROWS[1, :4].tolist()]])
    mask = (ids != PAD).long()
    for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}):
        expected = ours(**inputs).logits
        actual = theirs(**inputs).logits
        keep = mask[: len(expected)] != 0
        assert torch.allclose(actual[keep], expected[keep], atol=1e-4)
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(theirs.generate(**inputs, **options), ours.generate(**inputs, **options))
    losses = train(theirs.train(), steps=5)
    assert losses[-1] < losses[0]
