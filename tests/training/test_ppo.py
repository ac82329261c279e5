"""PPO on a tiny model: what is measured, what is learned, and how a killed run goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import forget_accelerator
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from chatglm import answering
from chatglm.training import run_log
from chatglm.training.data.batches import pick_rows
from chatglm.training.json_lines import cut_lines
from chatglm.training.ppo import trainer as ppo
from chatglm.training.ppo.math import clip_policy_loss, clip_value_loss, compute_ratios
from chatglm.training.ppo.rollouts import (
    Sampler,
    build_answers,
    evaluate_answers,
    find_ended,
    list_answers,
)
from chatglm.training.ppo.value_head import ActorCritic, list_trained
from chatglm.training.settings import KeyProblem, read_settings

# peft asks for transformers' old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

PROMPTS = ("你好", "what is AI?", "早", "how are you today?", "再见", "我想减肥")
LIKED = "好"
REWARDS = f"""
import os, signal

def like(prompts, answers, references):
    return [float(answer.count("{LIKED}")) for answer in answers]

def measure(prompts, answers, references):
    return [float(len(answer)) for answer in answers]

def match(prompts, answers, references):
    assert references == ["answer to " + prompt for prompt in prompts], references
    return [1.0] * len(answers)

def fail(prompts, answers, references):
    raise RuntimeError("out of order")

def spoil(prompts, answers, references):
    return [1e39] * len(answers)
"""


@pytest.fixture(autouse=True)
def without_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draw curves only in the test that looks at them: it takes longer than a run."""
    if "curves" not in request.node.name:
        monkeypatch.setattr(run_log, "draw_curves", lambda history, path: None)
    yield
    forget_accelerator()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Prompts, texts and rewards."""
    rows = [{"prompt": text, "response": f"answer to {text}"} for text in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def make_words(repo: Path, folder: Path, output: str = "out", **keys: Any) -> list[str]:
    """Flags of a small run."""
    given = {
        "model": repo,
        "train_data": folder / "prompts.jsonl",
        "reward_function": f"{folder / 'rewards.py'}:measure",
        "output": folder / output,
        "max_new_tokens": 6,
        "per_device_train_batch_size": 4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "max_steps": 2,
        "report_to": "none",
        "disable_tqdm": "true",
        **keys,
    }
    lists = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    return [str(word) for key, values in lists.items() for word in (f"--{key}", *values)]


def run(repo: Path, folder: Path, output: str = "out", **keys: Any) -> dict[str, Any]:
    forget_accelerator()
    words = make_words(repo, folder, output, **keys)
    return ppo.main(*read_settings(ppo.PpoSettings, ppo.PpoArguments, words))


def build_trainer(repo: Path, folder: Path, output: str = "out", **keys: Any) -> ppo.PpoTrainer:
    """What a run works with, before its first step."""
    words = make_words(repo, folder, output, **keys)
    settings, given = read_settings(ppo.PpoSettings, ppo.PpoArguments, words)
    arguments = ppo.read_arguments(given)
    forget_accelerator()
    torch.manual_seed(0)
    (folder / output).mkdir()
    accelerator = ppo.build_accelerator(settings, arguments)
    return ppo.PpoTrainer(settings, arguments, accelerator, None)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stir(parameters: list[Any], size: float = 0.1) -> None:
    """Change parameters as a training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def favour(model: Any, tokens: list[int], score: float) -> None:
    """Add a score to some tokens wherever they stand; without it, all 8192 are as likely."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    with torch.no_grad():
        model.transformer.final_layernorm.bias += score**0.5 * direction
        model.lm_head.weight[tokens] += score**0.5 * direction


@pytest.fixture
def actor(tiny_repo: Path) -> ActorCritic:
    model = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)
    actor = ActorCritic(model.float())
    stir([*actor.value_head.parameters()])
    return actor


@pytest.fixture
def rows(tiny_repo: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers of different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
    answers = ("很好！", "a field of study of machines", "早上好", "fine")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:4]]
    return prompts, [
        [*tokenizer(text, add_special_tokens=False)["input_ids"][:length], 7853]
        for text, length in zip(answers, (9, 2, 1, 5))
    ]


def learn(actor: ActorCritic, prompts: Any, answers: Any) -> tuple[Any, Tensor]:
    """Return what is said of answers, and the loss of a first update on made-up experience."""
    batch = build_answers(prompts, answers, 3, "cpu")
    judged = actor(*batch, 1.0, True)
    mask = batch.answer_mask
    columns = torch.arange(mask.shape[1]).expand_as(mask)
    advantages = torch.where(mask, (columns % 3 - 0.8), torch.nan)  # a column's own, pads none
    old = torch.where(mask, judged.log_probs.detach() - 0.1 * (columns % 2), torch.nan)
    ratios = compute_ratios(judged.log_probs, old, mask)
    losses = clip_policy_loss(ratios, advantages, mask, 0.2)[0]
    losses = losses + clip_value_loss(judged.values, advantages, advantages + 1, mask, 0.2)
    return (judged, mask), losses.sum()


def test_a_padded_batch_is_its_rows_alone(actor: ActorCritic, rows: Any) -> None:
    (judged, mask), loss = learn(actor, *rows)
    loss.backward()
    together = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in together.values())
    assert len(together) == len(list(actor.parameters()))
    actor.zero_grad()
    total = 0.0
    for number, (prompt, answer) in enumerate(zip(*rows)):
        (alone, _), loss_alone = learn(actor, [prompt], [answer])
        loss_alone.backward()
        total += loss_alone.item()
        for part, whole in zip(alone, judged):
            torch.testing.assert_close(part[0], whole[number][mask[number]], rtol=1e-4, atol=1e-5)
    assert total == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in actor.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-3, atol=2e-5)


def test_log_probs_are_those_of_the_models_own_logits(actor: ActorCritic, rows: Any) -> None:
    judged = evaluate_answers(actor, build_answers(*rows, 3, "cpu"), 2, temperature=0.7)
    for number, (prompt, answer) in enumerate(zip(*rows)):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = actor.policy(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)[range(len(answer)), answer]
        found = judged.log_probs[number, : len(answer)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shortest", (1, 32), ids=("rows", "batches"))
def test_answers_are_drawn_with_the_probabilities_that_are_recomputed(
    actor: ActorCritic, rows: Any, shortest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose draws they are for their seeds, and that the folder's top_p of 0.7 cuts nothing."""
    monkeypatch.setattr(answering, "SHORTEST", shortest)
    sampler = Sampler(actor.policy, max_new_tokens=5, temperature=0.8)
    own = actor.policy.generation_config
    answers = sampler(rows[0], [5, 6, 7, 8])
    assert actor.policy.generation_config is own
    for seed, prompt, answer in zip([5, 6, 7, 8], rows[0], list_answers(answers)):
        generator, known = torch.Generator().manual_seed(seed), list(prompt)
        for token in answer:
            with torch.no_grad():
                logits = actor.policy(torch.tensor([known])).logits[:, -1]
            shares = (logits / 0.8).softmax(-1)
            assert token == int(torch.multinomial(shares, 1, generator=generator))
            known.append(token)
    judged = evaluate_answers(actor, answers, 3, temperature=0.8)
    assert (judged.log_probs[answers.answer_mask] > -torch.inf).all()


def test_prompts_go_in_as_they_are_and_answers_end_behind_eop(
    actor: ActorCritic, rows: Any
) -> None:
    end = 7853
    favour(actor.policy, [end], 7.0)  # about one token in eight
    torch.manual_seed(0)
    answers = Sampler(actor.policy, max_new_tokens=12, batch_size=3)(rows[0])
    prompts = [i[m].tolist() for i, m in zip(answers.prompt_ids, answers.prompt_mask)]
    assert prompts == rows[0]
    ended = find_ended(answers, end)
    assert ended.any()
    for ids, has_end in zip(list_answers(answers), ended):
        assert (end in ids) == bool(has_end)
        assert end not in ids[:-1]
        assert has_end or len(ids) == 12


def test_rows_are_split_into_parts_of_like_length() -> None:
    prompts = [[5] * n for n in (9, 2, 8, 3, 5, 1)]
    answers = build_answers(prompts, [[6, 6]] * 6, 3, "cpu")
    parts = answers.split(torch.tensor([5, 4, 3, 2, 0]), 2)
    assert [part.tolist() for part in parts] == [[5, 3], [4, 2], [0]]


def test_every_pass_takes_every_row_once_and_stretches_join() -> None:
    walk = pick_rows(7, 1, 0, 21)
    for start in (0, 7, 14):
        assert sorted(walk[start : start + 7]) == list(range(7))
    assert walk[:7] != walk[7:14]
    assert pick_rows(7, 1, 3, 5) + pick_rows(7, 1, 8, 9) == walk[3:17]
    assert pick_rows(7, 2, 0, 21) != walk


@pytest.mark.parametrize("lora", (0, 2))
def test_the_reference_is_the_policy_in_the_beginning(
    tiny_repo: Path, folder: Path, lora: int
) -> None:
    trainer = build_trainer(tiny_repo, folder, lora_rank=lora)
    assert (trainer.maker.reference.beginning is None) == bool(lora)
    prompts = trainer.pick_prompts()
    answers, _, _ = trainer.maker.rollout(prompts)
    before, kl = trainer.maker.evaluate(answers)
    assert torch.equal(kl, torch.zeros_like(kl))
    stir(list_trained(trainer.actor.policy))
    after, moved = trainer.maker.evaluate(answers)
    assert (moved[answers.answer_mask] != 0).all()
    with trainer.maker.reference.put_in_place() as reference:
        held = evaluate_answers(reference, answers, 4)
    assert torch.equal(held.log_probs, before.log_probs)
    again, _ = trainer.maker.evaluate(answers)
    assert torch.equal(again.log_probs, after.log_probs)


def test_the_first_mini_batch_has_ratios_of_one(tiny_repo: Path, folder: Path) -> None:
    trainer = build_trainer(tiny_repo, folder)
    answers, _, scores = trainer.maker.rollout(trainer.pick_prompts())
    experience, figures = trainer.maker.compute_advantages(answers, scores + torch.arange(8.0))
    assert figures["kl"] == 0
    rows = torch.arange(trainer.run.batch_size)
    first = trainer.updater.update_mini_batch(experience, rows[: trainer.run.mini_batch_size])
    mask = experience.answers.answer_mask[: trainer.run.mini_batch_size]
    advantages = experience.advantages[: trainer.run.mini_batch_size][mask]
    assert first["update_kl"] == pytest.approx(0, abs=1e-6)
    assert first["clipped"] == 0
    assert first["policy_loss"] == pytest.approx(-advantages.mean().item(), abs=1e-5)


def test_a_mini_batch_is_learned_alike_however_it_is_split(tiny_repo: Path, folder: Path) -> None:
    results = []
    for number, keys in enumerate(
        (
            {"per_device_train_batch_size": 4},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        )
    ):
        ptx = {"ptx_data": folder / "prompts.jsonl", "entropy_coefficient": 0.01}
        trainer = build_trainer(tiny_repo, folder, f"out{number}", **keys, **ptx)
        gradients: list[Tensor] = []
        trainer.updater.take_optimizer_step = lambda t=trainer, g=gradients: g.extend(
            p.grad.clone() for p in list_trained(t.actor)
        )
        trainer.run.seed(0)
        answers, _, scores = trainer.maker.rollout(trainer.pick_prompts())
        experience, _ = trainer.maker.compute_advantages(answers, scores + torch.arange(8.0))
        figures = trainer.updater.update_mini_batch(experience, torch.arange(4))
        results.append((gradients, figures))
    (whole, figures), (split, split_figures) = results
    assert figures["ptx_loss"] > 5
    assert figures == pytest.approx(split_figures, abs=1e-4)
    for a, b in zip(whole, split):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lora", (0, 8))
def test_what_is_liked_is_said_more_often(tiny_repo: Path, folder: Path, lora: int) -> None:
    rates = {"learning_rate": 1e-2, "value_learning_rate": 1e-2, "kl_coefficient": 0.0}
    sizes = {"per_device_train_batch_size": 16, "num_ppo_epochs": 4, "max_new_tokens": 4}
    lasting = {"max_steps": 6, "lr_scheduler_type": "constant", "lora_rank": lora}
    lasting |= {"reward_function": f"{folder / 'rewards.py'}:like"}
    trainer = build_trainer(narrow(tiny_repo, folder), folder, **rates, **sizes, **lasting)
    trainer.train()
    rewards = [line["reward"] for line in read_lines(folder / "out" / "log.jsonl")]
    assert rewards[0] < 0.7  # of four tokens, each one of about ten
    assert sum(rewards[-2:]) / 2 > 2, rewards


def narrow(repo: Path, folder: Path) -> Path:
    """Copy a model, and let it say little beside a few tokens."""
    target = folder / "narrow"
    shutil.copytree(repo, target)
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    liked = tokenizer(LIKED, add_special_tokens=False)["input_ids"][-1]
    said = [liked, *range(5000, 5009)]
    favour(model, said, 9.0)
    with torch.no_grad():  # and tell them apart
        model.lm_head.weight[said] += 0.2 * torch.randn(10, 32, generator=torch.manual_seed(2))
    model.save_pretrained(target)
    return target


TRAINED = "model.safetensors", "adapter_model.safetensors", "value_head.safetensors"
# Dies of a real kill -9, half-way through a file or half-way through learning.
KILLED_RUN = """
import os, signal, sys
import torch
from chatglm.training import run_log
from chatglm.training.ppo import trainer as ppo
from chatglm.training.ppo.update import PolicyUpdater
from chatglm.training.settings import read_settings

run_log.draw_curves = lambda history, path: None
place, number, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
owner, name = {"writing": (torch, "save"), "learning": (PolicyUpdater, "add_part")}[place]
function, calls = getattr(owner, name), []

def die(*arguments):
    calls.append(1)
    if len(calls) == number:
        if place == "writing":
            arguments[1].write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)

setattr(owner, name, die)
ppo.main(*read_settings(ppo.PpoSettings, ppo.PpoArguments, words))
"""


def start_killed_run(
    python: str, place: str, number: int, words: list[str]
) -> subprocess.Popen[str]:
    variables = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [python, "-c", KILLED_RUN, place, str(number), *words],
        cwd=ROOT,
        env=variables,
        stderr=subprocess.PIPE,
        text=True,
    )


def list_figures(output: Path) -> list[dict[str, Any]]:
    """The log without what the clock and the memory say."""
    lines = read_lines(output / "log.jsonl")
    return [{k: v for k, v in line.items() if k not in ("tokens/s", "GB")} for line in lines]


def assert_same_bits(output: Path, expected: Path) -> None:
    names = [name for name in TRAINED if (expected / name).exists()]
    assert len(names) == 2
    for name in names:
        ours, theirs = load_file(output / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert list_figures(output) == list_figures(expected)
    assert read_lines(output / "samples.jsonl") == read_lines(expected / "samples.jsonl")


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(quick_python: str, tiny_repo: Path, folder: Path) -> None:
    keys = {
        "ptx_data": folder / "prompts.jsonl",
        "eval_data": folder / "prompts.jsonl",
        "sample_prompts": "你好",
        "learning_rate": 1e-3,
        "kl_coefficient": 0.5,
        "kl_target": 0.001,
        "max_steps": 3,
        "save_steps": 1,
        "eval_steps": 2,
        "logging_steps": 2,
    }
    # While the second checkpoint is written; in the third of the second step's mini-batches.
    cases = {"full": ("writing", 2, {}), "lora": ("learning", 7, {"lora_rank": 2})}
    killed = {
        name: start_killed_run(
            quick_python,
            place,
            number,
            make_words(tiny_repo, folder, f"killed-{name}", **keys, **more),
        )
        for name, (place, number, more) in cases.items()
    }
    for name, (_, _, more) in cases.items():
        run(tiny_repo, folder, f"whole-{name}", **keys, **more)
        _, errors = killed[name].communicate(timeout=120)
        assert killed[name].returncode == -signal.SIGKILL, errors
        output = folder / f"killed-{name}"
        left = {path.name for path in output.iterdir()}
        assert "checkpoint-1" in left and "checkpoint-2" not in left
        assert ("part-checkpoint-2" in left) == (name == "full")
        run(tiny_repo, folder, output.name, **keys, **more, resume="true")
        assert_same_bits(output, folder / f"whole-{name}")
    coefficients = {line.get("kl_coefficient") for line in list_figures(folder / "whole-full")}
    assert len(coefficients - {None}) == 2 and 0.5 not in coefficients


def test_a_run_from_adapters_goes_on_with_its_own_reference(tiny_repo: Path, folder: Path) -> None:
    """The reference is where the run began, not where it went on, and not the bare model."""
    start = build_trainer(tiny_repo, folder, "start", lora_rank=2)
    stir(list_trained(start.actor.policy))
    start.write_outputs()
    keys = {"adapter": folder / "start", "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    run(tiny_repo, folder, "whole", **keys)
    assert list_figures(folder / "whole")[0]["kl"] == 0
    run(tiny_repo, folder, "parts", **keys, max_steps=1)
    run(tiny_repo, folder, "parts", **keys, resume="true")
    assert_same_bits(folder / "parts", folder / "whole")
    assert list_figures(folder / "parts")[1]["kl"] != 0


def test_a_resumed_run_needs_as_many_processes(tiny_repo: Path, folder: Path) -> None:
    run(tiny_repo, folder, max_steps=1)
    state = folder / "out" / "checkpoint-1" / "trainer_state.json"
    state.write_text(state.read_text().replace('"num_processes": 1', '"num_processes": 4'))
    with pytest.raises(ValueError, match="written by 4 processes and 1 are running now"):
        run(tiny_repo, folder, resume="true")


def test_old_checkpoints_go(tiny_repo: Path, folder: Path) -> None:
    run(tiny_repo, folder, max_steps=3, save_steps=1, save_total_limit=2, num_ppo_epochs=1)
    left = sorted(path.name for path in (folder / "out").glob("*checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-3"]


def test_the_log_is_cut_where_the_checkpoint_was_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert cut_lines(path, 2) == [{"step": 1}, {"step": 2}]
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    assert cut_lines(path, None) == []
    assert path.read_text() == ""


def test_outputs_and_curves_can_be_loaded_and_read(tiny_repo: Path, folder: Path) -> None:
    for name in ("tensorboard", "matplotlib"):
        pytest.importorskip(name)
    figures = run(
        tiny_repo,
        folder,
        report_to="tensorboard",
        eval_data=folder / "prompts.jsonl",
        sample_prompts=["你好", "早"],
        reward_function=f"{folder / 'rewards.py'}:match",
    )
    output = folder / "out"
    assert figures["reward"] == figures["eval_reward"] == 1
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    start = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert set(load_file(output / "value_head.safetensors")) == {"weight", "bias"}
    assert (output / "curves.png").stat().st_size > 1000
    assert list((output / "runs" / "ppo").glob("events.*"))
    lines = read_lines(output / "log.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert {"kl", "entropy", "tokens/s", "GB", "clipped"} < lines[1].keys()
    samples = read_lines(output / "samples.jsonl")
    assert [(s["step"], "score" in s) for s in samples] == [
        *[(0, False)] * 2,
        (1, True),
        (2, True),
        *[(2, False)] * 2,
    ]


@pytest.mark.parametrize(
    "keys", ({"gradient_checkpointing": "true"}, {"rollout_batch_size": 3}, {"bf16": "true"})
)
def test_other_ways_to_compute_give_the_same_step(
    tiny_repo: Path, folder: Path, keys: dict[str, Any]
) -> None:
    more = {"max_steps": 1, "num_ppo_epochs": 1, "temperature": 0.5}
    plain = run(tiny_repo, folder, "plain", **more)
    other = run(tiny_repo, folder, "other", **more, **keys)
    if "rollout_batch_size" not in keys:  # which draws in another order
        close = 0.05 if "bf16" in keys else 1e-5
        for key in ("entropy", "policy_loss", "value_loss"):
            assert other[key] == pytest.approx(plain[key], rel=close, abs=close)
    assert other["kl"] == pytest.approx(0, abs=1e-6)
    assert other["answer_length"] == plain["answer_length"]


def test_scores_are_weighed_as_told(
    tiny_repo: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"missing_end_penalty": 2, "score_clip": 3, "kl_coefficient": 0, "gae_lambda": 1}
    trainer = build_trainer(tiny_repo, folder, **keys, whiten_advantages="false")
    answers, _, _ = trainer.maker.rollout(trainer.pick_prompts())
    assert not find_ended(answers, 7853).any()
    scores = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7])
    experience, figures = trainer.maker.compute_advantages(answers, scores)
    expected = torch.tensor([-2.0, -1, 0, 1, 2, 3, 3, 3])
    torch.testing.assert_close(experience.returns[:, 0], expected)
    torch.testing.assert_close(experience.advantages, experience.returns)  # values are 0
    assert figures["reward"] == 3.5 and figures["scores_cut"] == 2 / 8
    assert "score_clip" not in capsys.readouterr().err
    trainer.run.settings.score_clip = 1
    assert trainer.maker.compute_advantages(answers, scores)[1]["scores_cut"] == 5 / 8
    trainer.maker.compute_advantages(answers, scores)
    line = "62% of the scores are beyond score_clip=1 and count as that: raise it, or set whiten"
    assert capsys.readouterr().err.count(line) == 1
    trainer.run.settings.score_clip = 3
    trainer.run.settings.whiten_scores = True
    whitened = trainer.maker.compute_advantages(answers, scores)[0].returns[:, 0]
    torch.testing.assert_close(whitened.mean(), torch.tensor(0.0))
    torch.testing.assert_close(whitened.std(correction=0), torch.tensor(1.0))
    trainer.run.settings.whiten_advantages = True
    advantages = trainer.maker.compute_advantages(answers, scores)[0].advantages[
        answers.answer_mask
    ]
    assert advantages.std(correction=0) == pytest.approx(1, abs=1e-4)
    trainer.run.settings.whiten_rewards = True
    rewards = trainer.maker.compute_advantages(answers, scores)[0].returns
    assert rewards.isfinite().all()


def test_scores_count_from_those_of_the_datas_answers(tiny_repo: Path, folder: Path) -> None:
    keys = {"subtract_reference": "true", "max_new_tokens": 8}
    trainer = build_trainer(tiny_repo, folder, **keys)
    seen: list[Any] = []

    def score(sampled: Any) -> Tensor:
        seen.append(sampled)
        return torch.tensor([float(len(ids)) for ids in sampled.answer_ids])

    trainer.maker.reward = score
    prompts = trainer.pick_prompts()
    _, sampled, scores = trainer.maker.rollout(prompts)
    answered, references = seen
    assert answered is sampled and references.prompt_ids == sampled.prompt_ids
    assert references.answers == references.references == [p.reference for p in prompts]
    assert all(ids[-1] == 7853 and len(ids) <= 8 for ids in references.answer_ids)
    sizes = zip(sampled.answer_ids, references.answer_ids)
    assert scores.tolist() == [len(a) - len(b) for a, b in sizes]


def test_a_question_without_an_answer_has_no_score_to_subtract(
    tiny_repo: Path, folder: Path
) -> None:
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "why?"}) + "\n")
    with pytest.raises(ValueError, match=r"subtract_reference needs rows with .*why.* has none"):
        run(tiny_repo, folder, subtract_reference="true")


def test_packed_weights_practise_for_a_reward_model(tiny_repo: Path, folder: Path) -> None:
    scorer = AutoModelForSequenceClassification.from_pretrained(
        tiny_repo, trust_remote_code=True, num_labels=1
    )
    stir([scorer.score.weight], 1.0)
    scorer.save_pretrained(folder / "scorer")
    AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True).save_pretrained(
        folder / "scorer"
    )
    keys = {"reward_function": "", "reward_model": folder / "scorer", "bits": 4, "lora_rank": 2}
    trainer = build_trainer(tiny_repo, folder, "apart", **keys)
    answers, _, scores = trainer.maker.rollout(trainer.pick_prompts())
    ids = torch.cat((answers.prompt_ids[3][answers.prompt_mask[3]], answers.answer_ids[3]))
    with torch.no_grad():  # the answer was cut off, and is ended
        expected = scorer.eval()(input_ids=torch.tensor([[*ids, 7853]])).logits[0, 0]
    torch.testing.assert_close(scores[3], expected, rtol=1e-4, atol=1e-4)
    run(tiny_repo, folder, **keys, max_steps=1)
    figures = run(tiny_repo, folder, **keys, resume="true")
    assert figures["step"] == 2
    assert figures["kl"] != 0
    assert (folder / "out" / "adapter_config.json").exists()


def test_learning_ends_at_the_limit_of_an_update(tiny_repo: Path, folder: Path) -> None:
    keys = {"learning_rate": 1e-1, "num_ppo_epochs": 3, "update_kl_limit": 1e-3}
    trainer = build_trainer(tiny_repo, folder, **keys)
    steps: list[int] = []
    take = trainer.updater.take_optimizer_step
    trainer.updater.take_optimizer_step = lambda: (steps.append(1), take())[0]
    figures, _ = trainer.take_step()
    assert figures["update_kl"] > 0
    assert len(steps) == 1  # of six


def test_a_loss_that_is_no_number_ends_the_run(tiny_repo: Path, folder: Path) -> None:
    trainer = build_trainer(tiny_repo, folder)
    trainer.save()
    trainer.actor.value_head.weight.data.fill_(torch.nan)
    last = folder / "out" / "checkpoint-0"
    with pytest.raises(ValueError, match=f"was nan in step 1; {last} is the last good"):
        trainer.train()


def test_a_policy_that_says_no_number_ends_the_run(tiny_repo: Path, folder: Path) -> None:
    trainer = build_trainer(tiny_repo, folder)
    trainer.actor.policy.transformer.final_layernorm.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="was nan in step 1; no checkpoint was written before"):
        trainer.train()


@pytest.mark.parametrize(
    ("keys", "message"),
    (
        ({"reward_function": ""}, "reward_model or reward_function must be given"),
        ({"reward_model": "x"}, "reward_model or reward_function must be given, one of them"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be 1 or more, got 0"),
        ({"temperature": 0}, "temperature must be more than 0, got 0"),
        ({"top_p": 1.5}, "top_p must be from 0 to 1, got 1.5"),
        ({"kl_estimator": "k9"}, "kl_estimator must be one of"),
        ({"kl_target": -1}, "kl_target must be 0 or more, got -1"),
        ({"lora_rank": 2, "lora_dropout": 0.1}, "lora_dropout must be 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be 1 or more"),
        ({"bf16": "true", "fp16": "true"}, "bf16 and fp16 must be one of them"),
        ({"report_to": "no_such_tracker"}, "report_to must be none, or something"),
        ({"learning_rates": 1}, "did you mean learning_rate"),
        ({"lr_scheduler_type": "straight"}, "straight is not a valid SchedulerType"),
        ({"reward_function": "rewards:absent"}, "rewards cannot be imported"),
        ({"max_new_tokens": 4000}, "max_length is"),
    ),
)
def test_what_cannot_be_used_is_refused(
    tiny_repo: Path, folder: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_repo, folder, **keys)


def test_a_failing_reward_ends_the_run_in_words(tiny_repo: Path, folder: Path) -> None:
    for name, message in (("fail", "RuntimeError: out of order"), ("spoil", "the score inf")):
        with pytest.raises(ValueError, match=f"rewards.py:{name} .*{message}"):
            run(tiny_repo, folder, name, reward_function=f"{folder / 'rewards.py'}:{name}")


def test_a_reward_model_of_another_vocabulary_is_refused(tiny_repo: Path, folder: Path) -> None:
    other = folder / "other"
    shutil.copytree(tiny_repo, other)
    config = json.loads((other / "config.json").read_text()) | {"vocab_size": 130528}
    config |= {"architectures": ["ChatGLMForSequenceClassification"], "id2label": {"0": "score"}}
    (other / "config.json").write_text(json.dumps(config))
    weights = load_file(other / "model.safetensors")
    columns = weights["transformer.word_embeddings.weight"].shape[1]
    weights["transformer.word_embeddings.weight"] = torch.zeros(130528, columns)
    weights["score.weight"] = torch.zeros(1, columns)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its vocab_size is 130528, the policy's 8192"):
        run(tiny_repo, folder, reward_function="", reward_model=other)


def test_a_full_output_folder_is_refused(tiny_repo: Path, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("dear reader")
    with pytest.raises(ValueError, match="is not empty"):
        run(tiny_repo, folder)


def test_a_run_that_was_refused_leaves_nothing_in_the_way(tiny_repo: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot be imported"):
        run(tiny_repo, folder, reward_function="no_such_module:judge")
    assert run(tiny_repo, folder, max_steps=1)["step"] == 1


def test_keys_have_the_librarys_names() -> None:
    known = {item.name for item in fields(TrainingArguments)}
    assert {item.name for item in fields(ppo.PpoArguments)} <= known


def test_a_value_of_another_type_is_refused() -> None:
    with pytest.raises(KeyProblem, match="learning_rate must be of type float, got 'fast'"):
        ppo.read_arguments({"learning_rate": "fast"})


# One of two processes: learns from its half of given experience, then takes a step of its own.
HALF = """
import sys
from pathlib import Path
import torch
from accelerate.utils import gather_object
from chatglm.training.ppo import trainer as ppo
from chatglm.training.ppo.experience import Experience
from chatglm.training.settings import read_settings
from chatglm.training.resuming import open_output
from chatglm.training.ppo.value_head import Answers, list_trained
from chatglm.training.processes import leave

place, words = Path(sys.argv[1]), sys.argv[2:]
settings, given = read_settings(ppo.PpoSettings, ppo.PpoArguments, words)
arguments = ppo.read_arguments(given)
accelerator = ppo.build_accelerator(settings, arguments)
with open_output(settings, given, arguments) as begun:
    trainer = ppo.PpoTrainer(settings, arguments, accelerator, begun.checkpoint)
mine = slice(accelerator.process_index, None, 2)
parts = [part[mine] for part in torch.load(place / "experience.pt")]
experience = Experience(Answers(*parts[:4]), *parts[4:])
take = trainer.updater.take_optimizer_step
found = {}
trainer.updater.take_optimizer_step = lambda: found.update(
    gradients=[p.grad.clone() for p in list_trained(trainer.actor)]
)
trainer.model.train()
found["figures"] = trainer.updater.update_mini_batch(experience, torch.arange(4))
trainer.updater.take_optimizer_step = take
found["step"] = trainer.take_step()
sums = [p.detach().double().sum().item() for p in trainer.actor.parameters()]
found["sums"] = gather_object([sums])
found["step_figures"] = gather_object([found.pop("step")])
if accelerator.is_main_process:
    torch.save(found, place / "found.pt")
trainer.log.close()
leave(0)
"""


@pytest.mark.slow
def test_two_processes_learn_as_one(tiny_repo: Path, folder: Path) -> None:
    trainer = build_trainer(tiny_repo, folder, "one", max_new_tokens=9)
    trainer.actor.value_head.weight.data.fill_(0.1)
    trainer.run.seed(0)
    answers, _, scores = trainer.maker.rollout(trainer.pick_prompts())
    experience, _ = trainer.maker.compute_advantages(answers, scores)
    torch.save([*answers, *experience[1:]], folder / "experience.pt")
    trainer.actor.value_head.weight.data.fill_(0)  # as in the other processes
    gradients: list[Tensor] = []
    trainer.updater.take_optimizer_step = lambda: gradients.extend(
        p.grad.clone() for p in list_trained(trainer.actor)
    )
    trainer.model.train()
    figures = trainer.updater.update_mini_batch(experience, torch.arange(8))
    (folder / "half.py").write_text(HALF)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": "true"}
    words = make_words(tiny_repo, folder, "two", max_new_tokens=9, **sizes)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables |= {"PYTHON_EXEC": sys.executable}
    done = subprocess.run(
        [*launch, folder / "half.py", folder, *words],
        env=variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "found.pt")
    assert found["figures"] == pytest.approx(figures, abs=1e-5)
    assert len(found["gradients"]) == len(gradients)
    for ours, theirs in zip(found["gradients"], gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    one, other = found["sums"]
    assert one == other
    one, other = found["step_figures"]
    assert one == other
