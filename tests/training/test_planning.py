"""The arithmetic of memory and work, beside what small models take; and every file of configs/."""

import itertools
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build_model
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from chatglm.training.command import find_stage
from chatglm.training.estimate import memory as estimate
from chatglm.training.estimate.memory import Job, Shape, plan_memory
from chatglm.training.estimate.report import main, read_job, read_shape
from chatglm.training.models import add_adapters, load_policy
from chatglm.training.settings import KeyProblem, Settings, read_config, read_settings

# Transformers 5.23 has new names for checkpointing; users and peft still say the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

PRESET = ROOT / "chatglm" / "presets" / "chatglm-6b"
STAGES = sorted((ROOT / "configs" / "stages").glob("*.yaml"))
MEMORY_LINE = re.compile(
    r"# Memory for 6B: ([\d.]+) GB on each of (\d+) GPUs with (\w+)(, a pair two rows)?\n"
)
ROWS, LENGTH = 2, 96
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_rank": 4},
    "lora everywhere": {"lora_rank": 4, "lora_targets": ["all"]},
    "dora": {"lora_rank": 4, "lora_targets": ["dense,dense_4h_to_h"], "use_dora": True},
    "qlora": {"lora_rank": 4, "bits": 4},
    "prefix": {"pre_seq_len": 16},
    "projected prefix": {"pre_seq_len": 16, "prefix_projection": True},
}
HALVES = {"float32": {}, "autocast": {"bf16": True}}
# Beside packed matrices the biases are held in half too; float32 ones, as here, would widen all.
PAIRS = [(m, h) for m in METHODS for h in HALVES if (m, h) != ("qlora", "autocast")]


def build(method: str, **fields: Any) -> Any:
    """Return a small model that is trained in some way."""
    keys = METHODS[method]
    names = ("pre_seq_len", "prefix_projection")
    fields |= {name: keys[name] for name in names if name in keys}
    model = build_model(num_layers=6, **fields).train()
    model.quantize(keys.get("bits", 0))
    if "lora_rank" in keys:
        own = {key: value for key, value in keys.items() if key in ("lora_targets", "use_dora")}
        model = add_adapters(model, Settings(lora_rank=4, **own), "CAUSAL_LM")
    return model


def describe(model: Any) -> Shape:
    """Return the sizes of a small model."""
    config = model.config
    names = ("vocab_size", "hidden_size", "inner_hidden_size", "num_layers", "num_attention_heads")
    return Shape(*(getattr(config, name) for name in names), config.max_sequence_length)


def plan(model: Any, **keys: Any) -> tuple[Shape, Job]:
    """Return what the arithmetic takes, for the rows of these tests."""
    rows = {"per_device_train_batch_size": ROWS, "max_length": LENGTH}
    shape = describe(model)
    return shape, read_job(rows | keys, shape)


def draw_rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 300, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 40], ids[:, 41] = 301, 304
    labels = ids.clone()
    labels[:, :41] = -100  # up to <sop>
    return {"input_ids": ids, "labels": labels}


def measure_saved(model: Any, is_half: bool) -> int:
    """Return the bytes that autograd keeps of a forward pass, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        assert model(**draw_rows(), use_cache=False).loss.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in known)


def test_the_6b_model_has_its_numbers() -> None:
    assert read_shape(PRESET).parameters == 6_173_286_400


# What DoRA makes of its factors on the way is kept by whoever looks, and by nobody else.
@pytest.mark.parametrize(("method", "half"), [pair for pair in PAIRS if pair[0] != "dora"])
def test_activations_are_those_that_autograd_keeps(method: str, half: str) -> None:
    model = build(method)
    shape, job = plan(model, **METHODS[method], **HALVES[half])
    # What is frozen would be held in half; on a CPU the norms give half then, on a GPU float32.
    job.dtype = "float32"
    memory = plan_memory(shape, job)
    log_probs = memory.logits * 4 // estimate.LOGIT_BYTES
    expected = memory.activations + log_probs + memory.casts
    assert measure_saved(model, half == "autocast") == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_keeps_what_goes_into_blocks(method: str) -> None:
    model = build(method)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shape, job = plan(model, gradient_checkpointing=True, **METHODS[method])
    memory = plan_memory(shape, job)
    log_probs = memory.logits * 4 // estimate.LOGIT_BYTES
    # The block that is computed again is there later, when the logits are gone.
    expected = memory.activations + log_probs - estimate.count_block(shape, job)
    assert measure_saved(model, False) == pytest.approx(expected, rel=0.1)


def measure_peak(model: Any, is_half: bool) -> int:
    """Return the most bytes that a step takes beside weights and states, as torch allocates."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, rows = torch.optim.AdamW(trained, fused=True), draw_rows()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss = model(**rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    found: Any = profile.profiler
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("vocabulary", [320, 4096])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("method", "half"), [p for p in PAIRS if p[0] in ("full", "lora", "qlora", "dora")]
)
def test_the_peak_is_what_torch_allocates(
    method: str, half: str, checkpointing: bool, vocabulary: int
) -> None:
    model = build(method, vocab_size=vocabulary)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    keys = {**METHODS[method], **HALVES[half]}
    shape, job = plan(model, gradient_checkpointing=checkpointing, **keys)
    job.dtype = "float32"
    memory = plan_memory(shape, job)
    expected = memory.peak - memory.weights - memory.optimizer
    assert measure_peak(model, half == "autocast") == pytest.approx(expected, rel=0.1)


TRAININGS: dict[str, tuple[dict[str, Any], torch.dtype | None]] = {
    "full": ({}, None),
    "full in bfloat16": ({"dtype": "bfloat16"}, None),
    "lora": ({"lora_rank": 4}, torch.bfloat16),
    "qlora": ({"lora_rank": 4, "bits": 4}, torch.bfloat16),
    "dora": ({"lora_rank": 4, "use_dora": True, "lora_targets": ["all"]}, torch.bfloat16),
    "whole modules": (
        {
            "lora_rank": 4,
            "bits": 4,
            "modules_to_save": ["word_embeddings,lm_head", "final_layernorm", "input_layernorm"],
        },
        torch.bfloat16,
    ),
    "a whole layer": ({"lora_rank": 4, "modules_to_save": ["dense"]}, None),
    "grouped qlora": ({"lora_rank": 4, "bits": 8, "group_size": 32}, None),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_weights_gradients_and_states_are_exact(tiny_repo: Path, name: str) -> None:
    keys, half = TRAININGS[name]
    model = load_policy(Settings(model=str(tiny_repo), **keys), half)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shape = read_shape(tiny_repo)
    memory = plan_memory(shape, read_job({**keys, "bf16": half is not None}, shape))
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert memory.optimizer == sum(state.nbytes for state in states)


@pytest.mark.parametrize("projected", [False, True])
def test_prefixes_are_counted_exactly(projected: bool) -> None:
    method = "projected prefix" if projected else "prefix"
    model = build(method)
    shape, job = plan(model, **METHODS[method])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.count_trained(shape, job) == trained


@pytest.mark.parametrize("method", ["full", "lora", "lora everywhere", "prefix"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_work_is_what_torch_counts(method: str, checkpointing: bool) -> None:
    model = build(method, attn_implementation="eager")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shape, job = plan(model, gradient_checkpointing=checkpointing, **METHODS[method])
    counter = FlopCounterMode(display=False)
    with counter:
        model(**draw_rows(), use_cache=False).loss.backward()
    work = estimate.count_work(shape, job)
    keys = LENGTH + job.pre_seq_len
    # The eager twin keeps its scores: two forwards, not two and a half.
    scores = 0.5 * 4 * shape.num_layers * keys * shape.hidden_size
    expected = (work.total - scores) * ROWS * LENGTH
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


def test_parts_are_shared_by_the_gpus_that_cut_them() -> None:
    shape = read_shape(PRESET)
    keys = {"bf16": True, "per_device_train_batch_size": 1, "gpus": 8}
    plans = {
        name: plan_memory(shape, read_job({**keys, "sharding": name}, shape))
        for name in estimate.SHARDINGS
    }
    numbers = shape.parameters
    ddp, zero2, zero3, fsdp2 = (plans[name] for name in estimate.SHARDINGS)
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (4 * numbers, 4 * numbers, 8 * numbers)
    assert ddp.buffers == 4 * numbers and ddp.casts > 2 * shape.block_parameters
    assert (zero2.weights, zero2.gradients) == (2 * numbers, 2 * numbers // 8)
    assert zero2.optimizer == 12 * numbers // 8
    assert zero3.weights == 2 * numbers // 8 and zero3.buffers > zero2.buffers
    assert fsdp2.weights == 4 * numbers // 8 and fsdp2.casts == 0
    assert ddp.peak > zero2.peak > fsdp2.peak


def test_accumulated_gradients_stand_beside_the_logits() -> None:
    shape = read_shape(PRESET)
    once = plan_memory(shape, read_job({}, shape))
    often = plan_memory(shape, read_job({"gradient_accumulation_steps": 2}, shape))
    assert often.peak == once.weights + once.optimizer + once.gradients + (
        once.activations + once.logits + once.casts
    )
    assert once.peak < often.peak


@pytest.mark.parametrize(
    ("name", "sharding", "offload"),
    [
        ("zero2", "zero2", []),
        ("zero3", "zero3", []),
        ("zero2_offload", "zero2", ["optimizer"]),
        ("zero3_offload", "zero3", ["optimizer", "param"]),
    ],
)
def test_deepspeed_files_say_how_parts_are_cut(
    name: str, sharding: str, offload: list[str]
) -> None:
    shape = read_shape(PRESET)
    file = ROOT / "configs" / "deepspeed" / f"{name}.json"
    job = read_job({"deepspeed": str(file), "gpus": 4, "bf16": True}, shape)
    assert (job.sharding, job.offload) == (sharding, offload)
    memory = plan_memory(shape, job)
    on_host = {"optimizer": memory.optimizer, "param": memory.weights}
    assert all(on_host[part] == 0 for part in offload) and bool(memory.host) == bool(offload)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_stage_files_are_read_and_their_memory_is_planned(path: Path) -> None:
    stage_name = path.stem.partition("_")[0]
    if stage_name in ("reward", "dpo", "grpo"):
        pytest.importorskip("trl", reason="this stage is built on trl")
    stage = find_stage(stage_name)
    settings, _ = read_settings(stage.settings, stage.arguments, ["--config", str(path)])
    assert settings.output.startswith("out/")
    found = MEMORY_LINE.search(path.read_text(encoding="utf-8"))
    if found is None:
        assert stage_name in ("reward", "ppo")  # no logits, or more models than one
        return
    shape = read_shape(PRESET)
    job = read_job({**read_config(path), "gpus": int(found[2]), "sharding": found[3]}, shape)
    job.per_device_train_batch_size *= 2 if found[4] else 1
    assert f"{plan_memory(shape, job).peak / 1e9:.1f}" == found[1]


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(PRESET), "--config", str(STAGES[0].with_name("sft_qlora.yaml"))]
    assert main([*words, "--tflops", "100", "--tokens", "1e6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "6.173 billion parameters" in lines[0] and "over 4-bit weights" in lines[0]
    assert lines[1] == "1 x 2048 tokens at a time on one GPU, gradient checkpointing"
    assert any(line.startswith("  weights ") for line in lines)
    assert "tokens/s" in lines[-1] and "hours for 1,000,000 tokens" in lines[-1]
    assert main([*words, "--max_length", "512", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["job"]["max_length"] == 512 and report["job"]["bits"] == 4
    assert report["bytes"]["peak"] > report["bytes"]["weights"] > 3.5e9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "1"], "learning_rate does not matter for memory"),
        (["--bits", "4"], "bits=4 cannot be trained: set lora_rank or pre_seq_len"),
        (["--sharding", "zero1"], "sharding must be ddp or zero2 or zero3 or fsdp2, got 'zero1'"),
        (["--optim", "lion"], "optim must be"),
        (["--lora_rank", "2", "--lora_targets", "head"], "lora_targets names head, which is no"),
        (["--bits", "4", "--lora_rank", "2", "--sharding", "fsdp2"], "packed weights are not cut"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(PRESET), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("chatglm: ") and error.count("\n") == 1 and message in error


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    with pytest.raises(ValueError, match=r"has no hidden_size, .* it is not of a ChatGLM model"):
        read_shape(tmp_path)


def test_a_value_of_another_type_is_refused() -> None:
    with pytest.raises(KeyProblem, match="max_length must be of type int"):
        read_job({"max_length": "long"}, read_shape(PRESET))


def test_the_module_runs_by_itself(quick_python: str) -> None:
    command = [quick_python, "-m", "chatglm.training.planning", str(PRESET), "--lora_rank", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "LoRA of rank 8" in done.stdout
