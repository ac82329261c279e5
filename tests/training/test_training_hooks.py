"""What training leans on in transformers, trl, accelerate, peft and torch, each hook by its name.

As in tests/contract/test_model_hooks.py: the name is the test's id, and docs/hooks.md has a row for
each. A few runs of some steps are looked at from all sides.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from aligning import forget_accelerator, make_pairs, read_log, train, write_rows
from conftest import build_model, count_calls
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer import TRAINER_STATE_NAME

from chatglm.training import progress, stage
from chatglm.training import trainer as core
from chatglm.training.checkpoint_callback import follow_schedule
from chatglm.training.checkpoints import STATE_FILE, find_checkpoint
from chatglm.training.data.batches import LengthSampler, PaddingCollator
from chatglm.training.defaults import DEFAULTS
from chatglm.training.keys.refusals import RESERVED
from chatglm.training.models import name_as_before
from chatglm.training.precision import LAUNCHER
from chatglm.training.processes import keep_to_one_gpu
from chatglm.training.trainer import CheckedSteps

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is dep:FutureWarning")

SIZE, EPOCHS, STEPS = 2, 2, 6
ALIGNED = ("dpo", "reward", "grpo")
QUESTION_STEPS = "_tokenize_prompts", "_generate_and_score_completions", "_generate_single_turn"
JUDGE = "def count(prompts, answers, references):\n    return [len(a) for a in answers]\n"


def keep_trainer(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the trainers of the runs that follow, whose models are not written."""
    trainers: list[Any] = []
    monkeypatch.setattr(core, "save_trained", lambda *args: None)
    evaluate = core.train_and_evaluate

    def keep(trainer: Any, *args: Any) -> Any:
        trainers.append(trainer)
        return evaluate(trainer, *args)

    monkeypatch.setattr(stage, "train_and_evaluate", keep)
    return trainers


# Supervised fine-tuning: the Trainer of transformers


@pytest.fixture(scope="module")
def finished(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training of two epochs with a bar, checkpoints and rows grouped by length."""
    folder, calls = tmp_path_factory.mktemp("hooks"), Counter()
    numbers = [1 + (7 * number) % 17 for number in range(SIZE * STEPS)]
    rows = [{"prompt": "word " * number, "response": "yes"} for number in numbers]
    data = write_rows(folder / "rows.jsonl", rows)
    batches: list[list[int]] = []
    bars: list[Any] = []
    collate = PaddingCollator.__call__

    def note_batch(self: Any, examples: Any) -> Any:
        batches.append([len(example.input_ids) for example in examples])
        return collate(self, examples)

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    keys = {
        "max_steps": -1,
        "num_train_epochs": EPOCHS,
        "save_steps": EPOCHS * STEPS,
        "eval_data": data,
    }
    keys |= {"per_device_train_batch_size": SIZE, "group_by_length": True, "disable_tqdm": False}
    keys |= {"eval_steps": STEPS}
    with pytest.MonkeyPatch.context() as monkeypatch:
        trainers = keep_trainer(monkeypatch)
        monkeypatch.setattr(PaddingCollator, "__call__", note_batch)
        monkeypatch.setattr(progress, "tqdm", Bar)
        for name in ("_save", "training_step", "log", "get_batch_samples"):
            count_calls(monkeypatch, CheckedSteps, name, calls)
        train("sft", tiny_repo, data, folder / "out", **keys)
    found = {"trainer": trainers[0], "output": folder / "out", "batches": batches}
    return SimpleNamespace(**found, bars=bars, calls=calls)


def drawn_lengths(finished: Any, epoch: int) -> list[int]:
    """The lengths of the rows of an epoch, in the order in which our sampler draws them."""
    lengths = finished.trainer.train_dataset.lengths
    sampler = LengthSampler(lengths, SIZE, finished.trainer.args.seed)
    sampler.set_epoch(epoch)
    return [lengths[row] for row in sampler]


@pytest.mark.parametrize("hook", ["Trainer._get_train_sampler"])
def test_rows_of_like_length_share_a_batch(hook: str, finished: Any) -> None:
    found = [length for batch in finished.batches[:STEPS] for length in batch]
    assert found == drawn_lengths(finished, 0), f"{hook} is not asked"
    assert sorted(found) != found


@pytest.mark.parametrize("hook", ["DataLoaderShard.set_epoch"])
def test_every_epoch_has_an_order_of_its_own(hook: str, finished: Any) -> None:
    learned = [batch for batch in finished.batches if len(batch) == SIZE]
    expected = drawn_lengths(finished, 1)
    assert drawn_lengths(finished, 0) != expected
    starts = range(len(learned) - STEPS + 1)
    epochs = [[n for batch in learned[i : i + STEPS] for n in batch] for i in starts]
    assert expected in epochs[STEPS:], f"{hook} does not reach the sampler"


@pytest.mark.parametrize(
    "hook",
    ["Trainer._save", "Trainer.training_step", "Trainer.log", "Trainer.get_batch_samples"],
)
def test_the_trainer_goes_through_our_steps(hook: str, finished: Any) -> None:
    least = 1 if hook == "Trainer._save" else EPOCHS * STEPS
    assert finished.calls[hook.split(".")[1]] >= least, f"{hook} is not called"


@pytest.mark.parametrize("hook", ["Trainer.compute_loss"])
def test_tokens_are_counted(hook: str, finished: Any) -> None:
    rates = read_log(finished.output, "tokens/s")
    assert len(rates) == EPOCHS * STEPS and min(rates) > 0, f"{hook} is not called"
    lengths = finished.trainer.train_dataset.lengths
    assert finished.trainer.tokens_seen == EPOCHS * sum(lengths)


@pytest.mark.parametrize("hook", ["transformers.ProgressCallback", "transformers.PrinterCallback"])
def test_there_is_one_bar_and_it_shows_figures(hook: str, finished: Any) -> None:
    kinds = [type(callback) for callback in finished.trainer.callback_handler.callbacks]
    assert not {ProgressCallback, PrinterCallback} & set(kinds), f"{hook} was not taken away"
    assert kinds.count(progress.FigureBar) == 1
    steps = finished.bars[0]
    assert steps.n == steps.total == EPOCHS * STEPS
    assert "loss=" in steps.postfix and "tokens/s=" in steps.postfix
    assert len(finished.bars) > 1, "no second bar for the held-out rows"


@pytest.mark.parametrize("hook", ["trainer.TRAINER_STATE_NAME"])
def test_a_whole_checkpoint_is_found(hook: str, finished: Any) -> None:
    newest = finished.output / f"checkpoint-{EPOCHS * STEPS}"
    assert STATE_FILE == TRAINER_STATE_NAME, f"{hook} has another name"
    assert find_checkpoint(finished.output) == newest, f"{hook} is not written"


@pytest.mark.parametrize("hook", ["TrainerState.best_global_step"])
def test_the_best_checkpoint_is_known_by_its_step(hook: str) -> None:
    names = {field.name for field in dataclasses.fields(TrainerState)}
    assert {"best_global_step", "best_model_checkpoint", "best_metric"} <= names, hook


@pytest.mark.parametrize("hook", ["LambdaLR.lr_lambdas"])
def test_a_schedule_follows_its_own_length(hook: str) -> None:
    """As where a run goes on that is longer than it was to be."""
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler("linear", optimizer, 0, 10)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    state = SimpleNamespace(global_step=0, max_steps=10)
    follow_schedule(optimizer, scheduler, 5, state)
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == 1.0, hook


@pytest.mark.parametrize("hook", ["Trainer.model_accepts_loss_kwargs"])
def test_accumulated_losses_are_of_all_their_tokens(hook: str, finished: Any) -> None:
    """The Trainer looks for `**kwargs` in the signature of `forward`."""
    assert finished.trainer.model_accepts_loss_kwargs is True, f"{hook} is gone, or says no"


@pytest.mark.parametrize(
    "hook",
    [
        "Trainer.label_smoother",
        "Trainer.model_wrapped",
        "Trainer.is_fsdp_enabled",
        "Trainer.is_deepspeed_enabled",
        "Trainer.processing_class",
        "Trainer._prepare_inputs",
        "Trainer.compute_loss_context_manager",
        "Trainer.current_gradient_accumulation_steps",
    ],
)
def test_a_trainer_has(hook: str, finished: Any) -> None:
    assert hasattr(finished.trainer, hook.split(".")[1]), f"{hook} is gone"


@pytest.mark.parametrize("hook", ["PretrainedConfig.keys_to_ignore_at_inference"])
def test_an_evaluation_gathers_no_caches(hook: str, tmp_path: Path) -> None:
    ids = torch.tensor([[301, 304, 7, 8]])
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(build_model(use_cache=True), arguments)
    _, logits, _ = trainer.prediction_step(trainer.model, {"input_ids": ids, "labels": ids}, False)
    assert isinstance(logits, torch.Tensor), f"{hook} is not read: {type(logits)}"


@pytest.mark.parametrize("hook", ["transformers.TrainingArguments"])
def test_the_keys_that_we_set_exist(hook: str) -> None:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert DEFAULTS.keys() <= names, f"{hook} lacks {DEFAULTS.keys() - names}"
    either = names & {"gradient_checkpointing", "activation_checkpointing"}
    reserved = RESERVED.keys() - {"train_sampling_strategy"}
    assert either and reserved <= names, f"{hook} lacks what is reserved"


@pytest.mark.parametrize("hook", ["dynamic_module_utils.get_class_from_dynamic_module"])
def test_a_folder_s_classes_are_found(hook: str, tiny_repo: Path) -> None:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = "ChatGLMForSequenceClassification"
    found = get_class_from_dynamic_module(f"modeling_chatglm.{name}", str(tiny_repo))
    assert found.__name__ == name, hook


@pytest.mark.parametrize("hook", ["torch.distributed.fsdp.FSDPModule"])
def test_a_model_in_parts_gets_its_class_s_name_back(hook: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build_model(num_layers=1)
    name, module = type(model).__name__, type(model).__module__
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert type(model).__name__ != name, f"{hook} gives classes no other name any more"
        name_as_before(model)
        assert (type(model).__name__, type(model).__module__) == (name, module), hook
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("hook", ["TrainingArguments._n_gpu"])
def test_a_process_keeps_to_one_gpu(
    tmp_path: Path, hook: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where several are seen without a launcher, which a CPU can be made to believe."""
    forget_accelerator()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    options = {"per_device_train_batch_size": 3, "report_to": [], "use_cpu": False}
    arguments = TrainingArguments(str(tmp_path), **options)
    model = torch.nn.Linear(2, 2)
    spread = Trainer(model, arguments)._wrap_model(model)
    assert type(spread) is torch.nn.DataParallel, f"{hook}: transformers spreads no more"
    arguments = TrainingArguments(str(tmp_path), **options)
    keep_to_one_gpu(arguments)
    assert (arguments.n_gpu, arguments.train_batch_size, arguments.eval_batch_size) == (1, 3, 8)
    assert Trainer(model, arguments)._wrap_model(model) is model, hook
    assert capsys.readouterr().err.startswith("chatglm: 4 GPUs are seen and cpu alone is used")
    forget_accelerator()


# The stages on trl


@pytest.fixture(scope="module")
def aligned(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two steps of each stage outside of a CI, and what would have been sent."""
    pytest.importorskip("trl")
    from chatglm.training.stages.grpo import GroupTrainer

    folder, calls, sent = tmp_path_factory.mktemp("aligned"), Counter(), []
    pairs = write_rows(folder / "pairs.jsonl", make_pairs(range(4)))
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": f"is {n} good?"} for n in range(8)])
    (folder / "judge.py").write_text(JUDGE)
    keys: dict[str, dict[str, Any]] = {stage: {"lora_rank": 2} for stage in ALIGNED}
    keys["reward"] = {}
    keys["grpo"] |= {"reward_function": f"{folder / 'judge.py'}:count", "num_generations": 2}
    keys["grpo"] |= {"max_completion_length": 4, "beta": 0.1}
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("CI", raising=False)
        monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **kw: sent.append(kw))
        for name in QUESTION_STEPS:
            count_calls(monkeypatch, GroupTrainer, name, calls)
        trainers = keep_trainer(monkeypatch)
        for stage in ALIGNED:
            data = prompts if stage == "grpo" else pairs
            train(stage, tiny_repo, data, folder / stage, max_steps=2, save_steps=2, **keys[stage])
            found[stage] = trainers[-1]
    return SimpleNamespace(trainers=found, folder=folder, calls=calls, sent=sent)


@pytest.mark.parametrize("hook", ["_BaseTrainer._send_telemetry"])
def test_nothing_is_sent(hook: str, aligned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer.base_trainer import _BaseTrainer

    assert not aligned.sent, f"{hook} is no longer how figures are sent"
    sent: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **kw: sent.append(kw))
    _BaseTrainer._send_telemetry(aligned.trainers["dpo"])
    assert sent, f"{hook} of trl itself sends nothing here: this test would see no loss"


@pytest.mark.parametrize("hook", ["_BaseTrainer.create_model_card"])
def test_no_card_is_written(hook: str, aligned: Any) -> None:
    assert hasattr(aligned.trainers["dpo"], "create_model_card")
    cards = [p for p in aligned.folder.rglob("README.md") if "trl" in p.read_text()[:2000]]
    assert not [p for p in cards if "generated_from_trainer" in p.read_text()], hook


@pytest.mark.parametrize(
    "hook", ["DPOTrainer.compute_loss", "RewardTrainer.compute_loss", "GRPOTrainer.compute_loss"]
)
def test_tokens_of_pairs_and_answers_are_counted(hook: str, aligned: Any) -> None:
    stage = hook.partition("Trainer")[0].lower()
    rates = read_log(aligned.folder / stage, "tokens/s")
    assert len(rates) == 2 and min(rates) > 0, f"{hook} is not called, or no batch of ours"


@pytest.mark.parametrize("hook", ["DPOTrainer._prepare_dataset", "RewardTrainer._prepare_dataset"])
def test_rows_are_taken_as_they_are_rendered(hook: str, aligned: Any) -> None:
    trainer = aligned.trainers[hook.partition("Trainer")[0].lower()]
    columns = set(trainer.train_dataset.column_names)
    assert {"chosen_ids", "rejected_ids", "row", "length"} <= columns, f"{hook} is not called"
    theirs = [c for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
    assert any("_prepare_dataset" in vars(c) for c in theirs), f"{hook} is gone"


@pytest.mark.parametrize(
    "hook",
    [
        "GRPOTrainer._tokenize_prompts",
        "GRPOTrainer._generate_and_score_completions",
        "GRPOTrainer._generate_single_turn",
    ],
)
def test_questions_go_through_our_steps(hook: str, aligned: Any) -> None:
    assert aligned.calls[hook.split(".")[1]] > 0, f"{hook} is not called"


@pytest.mark.parametrize("hook", ["GRPOTrainer.generation_kwargs"])
def test_the_options_of_answers_are_trl_s(hook: str, aligned: Any) -> None:
    """What a key of trl's says about draws would be lost without a word."""
    options = getattr(aligned.trainers["grpo"], hook.split(".")[1])
    assert options["max_new_tokens"] == 4 and options["do_sample"] is True, hook
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"} <= options.keys(), hook


@pytest.mark.parametrize(
    "hook", ["RepeatSampler.shuffle", "RepeatSampler.generator", "RepeatSampler.seed"]
)
def test_the_order_of_questions_follows_from_the_epoch(hook: str, aligned: Any) -> None:
    sampler = aligned.trainers["grpo"]._get_train_sampler()
    assert hasattr(sampler, hook.split(".")[1]), f"{hook} is gone"
    orders = []
    for epoch in (1, 1, 2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1] != orders[2], f"{hook} does not draw the order"


@pytest.mark.parametrize("hook", ["PeftModel.peft_config", "PeftModel.delete_adapter"])
def test_the_reference_of_new_adapters_is_the_model_without(hook: str, aligned: Any) -> None:
    model = aligned.trainers["dpo"].accelerator.unwrap_model(aligned.trainers["dpo"].model)
    assert list(model.peft_config) == ["default"], f"{hook}: trl's copy is still there"
    checkpoint = aligned.folder / "dpo" / "checkpoint-2"
    assert len(list(checkpoint.rglob("adapter_model.safetensors"))) == 1, hook


@pytest.mark.parametrize("hook", ["PeftModel.save_pretrained(selected_adapters)"])
def test_the_copy_of_a_folder_s_adapters_is_not_saved(
    hook: str, tiny_repo: Path, aligned: Any, tmp_path: Path
) -> None:
    pairs, first = aligned.folder / "pairs.jsonl", aligned.folder / "dpo" / "checkpoint-2"
    keys = {"max_steps": 1, "save_steps": 1, "adapter": first}
    train("dpo", tiny_repo, pairs, tmp_path / "out", **keys)
    saved = list((tmp_path / "out" / "checkpoint-1").rglob("adapter_model.safetensors"))
    assert len(saved) == 1, f"{hook} is not read: {saved}"


@pytest.mark.parametrize(
    "hook", ["DPOTrainer.loss_is_scaled_for_ga", "GRPOTrainer.loss_is_scaled_for_ga"]
)
def test_it_is_known_who_takes_the_mean_over_passes(hook: str) -> None:
    """What is learned beside is divided by them as the trainer's own loss is."""
    trl = pytest.importorskip("trl", reason="trl has no release for Python 3.10")
    trainer, name = hook.split(".")
    found = getattr(getattr(trl, trainer), name, None)
    assert found is (trainer == "GRPOTrainer"), f"{hook} is {found}"


@pytest.mark.parametrize("hook", ["GRPOConfig.use_vllm"])
def test_every_refused_key_is_one_of_trl_s(hook: str) -> None:
    """A shortcut that was renamed would read questions causally, and no longer be refused."""
    trl = pytest.importorskip("trl")
    from chatglm.training.stages.trl_stages import REFUSED

    configs = (trl.DPOConfig, trl.RewardConfig, trl.GRPOConfig, TrainingArguments)
    names = {field.name for config in configs for field in dataclasses.fields(config)}
    assert REFUSED.keys() <= names, f"{hook} or another was renamed: {REFUSED.keys() - names}"


# Several processes on CPUs


@pytest.mark.parametrize("hook", ["torch.serialization.register_package"])
def test_a_checkpoint_is_read_to_a_cpu_with_a_number(hook: str, tmp_path: Path) -> None:
    torch.save({"step": torch.ones(3)}, tmp_path / "optimizer.pt")
    for place in ("cpu:1", torch.device("cpu", 0)):
        read = torch.load(tmp_path / "optimizer.pt", map_location=place, weights_only=True)
        assert torch.equal(read["step"], torch.ones(3)), f"{hook} does not lead to {place}"


# Proximal policy optimization: accelerate


@pytest.mark.parametrize("hook", ["accelerate.ACCELERATE_MIXED_PRECISION"])
def test_accelerate_reads_what_its_launcher_asks_for(
    hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hook.endswith(LAUNCHER)
    for name in ("bf16", "no"):
        forget_accelerator()
        monkeypatch.setenv(LAUNCHER, name)
        found = Accelerator(cpu=True).mixed_precision
        assert found == name, f"{hook} is not what accelerate reads: {found} for {name}"
    forget_accelerator()


@pytest.mark.parametrize("hook", ["tensorboard.SummaryWriter(purge_step)"])
def test_a_resumed_curve_has_no_doubled_points(
    hook: str, tiny_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import tensorboard

    given: list[dict[str, Any]] = []

    class Writer(tensorboard.SummaryWriter):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given.append(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(tensorboard, "SummaryWriter", Writer)
    monkeypatch.setattr("chatglm.training.run_log.draw_curves", lambda *args: None)
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"is {n} good?"} for n in range(8)])
    (tmp_path / "judge.py").write_text(JUDGE)
    keys = {"reward_function": f"{tmp_path / 'judge.py'}:count", "max_new_tokens": 4}
    keys |= {"report_to": "tensorboard", "save_steps": 1, "num_mini_batches": 1}
    for steps, more in ((1, {}), (2, {"resume": True})):
        forget_accelerator()
        train("ppo", tiny_repo, data, tmp_path / "out", **keys, **more, max_steps=steps)
    assert [kwargs.get("purge_step") for kwargs in given] == [None, 2], f"{hook} is not handed on"
