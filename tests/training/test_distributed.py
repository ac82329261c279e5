"""Two processes on the CPU (gloo): DDP, FSDP2, ZeRO; a kill -9 and what goes on from it.

accelerate's launcher starts two processes with configs/accelerate/ddp.yaml here. With fsdp2.yaml it
takes DDP on CPUs, which is refused; so FSDP2 is tested through torch's own `fully_shard`, and
by the trainer with accelerate told that parts can be sent around.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aligning import forget_accelerator, make_pairs, train, words, write_rows
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from chatglm.training.processes import check_parts
from chatglm.training.progress import build_callbacks
from chatglm.training.settings import KeyProblem, Settings, read_settings
from chatglm.training.stages import sft

WORKER = Path(__file__).with_name("distributed_worker.py")
CONFIGS = ROOT / "configs"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TRAIN_SFT = ["-m", "chatglm.training.command", "sft"]
ROWS = ["--per_device_train_batch_size", "2"]
DEAD_AFTER, STEPS = 3, 4
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def keys(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the words of a training but for its output and the rows of a process."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"prompt": f"{i} " * (1 + i % 5), "response": f"{i * i} " * (1 + i % 3)} for i in range(16)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    words = f"--model {tiny_repo} --train_data {file} --max_steps {STEPS} --learning_rate 1e-3"
    words += " --save_steps 2 --logging_steps 1 --disable_tqdm --report_to none"
    return words.split()


@pytest.fixture(scope="module")
def quick_python() -> str:
    """A real Python: a fork that torch's launcher starts was seen to die at its end (SIGABRT)."""
    return sys.executable


@pytest.fixture(scope="module")
def one(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in this process, on as many rows a step as two processes take."""
    output = tmp_path_factory.mktemp("one")
    words = [*keys, "--per_device_train_batch_size", "4", "--output", str(output / "sft")]
    sft.STAGE.run(*read_settings(sft.STAGE.settings, sft.STAGE.arguments, words))
    return output / "sft"


@pytest.fixture(scope="module")
def two(quick_python: str, keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in two processes."""
    output = tmp_path_factory.mktemp("two") / "sft"
    done = run(quick_python, [*TORCHRUN, *TRAIN_SFT, *keys, *ROWS, "--output", str(output)])
    assert done.stdout.count('{"steps": ') == 1  # one process speaks
    return output


def run(python: str, words: list[str], is_killed: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a module of a Python, which a launcher starts its processes with too."""
    # A deepspeed in a folder of its own (pip install --target) is found by the launcher's too.
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
    variables |= {"PYTHON_EXEC": python}
    done = subprocess.run(
        [python, "-m", *words],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert bool(done.returncode) == is_killed, done.stderr
    return done


def read_losses(output: Path) -> list[float]:
    """Return the loss of every step."""
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def largest_difference(first: Path, second: Path) -> float:
    """Return how far any weight of two folders is apart."""
    weights, others = read_weights(first), read_weights(second)
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


def share_of_the_way(start: Path, first: Path, second: Path) -> float:
    """Return how far two trained models are apart, as a share of how far one has come.

    AdamW makes a whole step of a gradient that is nothing but last digits, in a few weights.
    """
    begun, weights, others = map(read_weights, (start, first, second))
    assert weights.keys() == others.keys() >= begun.keys()
    apart = sum(float((weights[n] - others[n]).double().square().sum()) for n in weights)
    moved = sum(float((weights[n] - begun[n]).double().square().sum()) for n in begun)
    return (apart / moved) ** 0.5


@pytest.mark.slow
def test_two_processes_train_as_one(one: Path, two: Path) -> None:
    assert read_losses(two) == pytest.approx(read_losses(one), abs=TOLERANCE)
    assert len(set(read_losses(one))) == STEPS
    assert largest_difference(one, two) < TOLERANCE
    begun = read_weights(one / "checkpoint-2")
    moved = read_weights(one)
    assert max((moved[name] - begun[name]).abs().max().item() for name in moved) > 1e-4


@pytest.fixture(scope="module")
def dead(
    quick_python: str,
    tiny_repo: Path,
    keys: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """Let accelerate start two processes that try FSDP2, then train until one is killed."""
    folder = tmp_path_factory.mktemp("dead")
    words = [
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "accelerate" / "ddp.yaml"),
    ]
    words += ["--num_processes", "2", "--main_process_port", "0", str(WORKER)]
    words += ["fsdp2", str(tiny_repo), str(folder / "found.json"), "then"]
    words += ["refuse", str(folder / "refused"), *keys, *ROWS, "--output", str(tiny_repo), "then"]
    words += ["die", str(DEAD_AFTER), *keys, *ROWS, "--output", str(folder / "sft")]
    done = run(quick_python, words, is_killed=True)
    assert "exitcode: -9" in done.stderr
    return folder / "sft", json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_blocks_in_parts_train_as_whole_ones(dead: tuple[Path, dict[str, Any]]) -> None:
    found = dead[1]
    assert (found["processes"], found["parts"]) == (2, "DTensor")
    assert found["losses"] == pytest.approx(found["expected"], abs=TOLERANCE)
    assert found["losses"][-1] < found["losses"][0] - 0.01
    assert found["difference"] < TOLERANCE


@pytest.mark.slow
def test_what_was_in_parts_is_a_model_folder(
    tiny_repo: Path, dead: tuple[Path, dict[str, Any]]
) -> None:
    saved = Path(dead[1]["saved"])
    files = {file.name for file in saved.iterdir()}
    assert files >= {file.name for file in tiny_repo.iterdir()}
    assert not {name for name in files if "fsdp" in name}
    assert read_weights(saved).keys() == read_weights(tiny_repo).keys()  # tied ones once
    model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    weights = read_weights(saved)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items() if n in weights)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    quick_python: str, two: Path, dead: tuple[Path, dict[str, Any]], keys: list[str]
) -> None:
    output = dead[0]
    assert (output / "checkpoint-2").is_dir() and not (output / "model.safetensors").exists()
    words = [*keys, *ROWS, "--output", str(output), "--resume"]
    run(quick_python, [*TORCHRUN, *TRAIN_SFT, *words])
    assert largest_difference(two, output) == 0
    assert read_losses(output) == read_losses(two)


@pytest.mark.slow
def test_a_full_folder_stops_all_processes_for_one_reason(
    tiny_repo: Path, dead: tuple[Path, dict[str, Any]]
) -> None:
    reasons = [(dead[0].parent / f"refused.{number}").read_text() for number in range(2)]
    assert reasons[0].startswith(f"the output folder {tiny_repo} is not empty")
    assert reasons[0] == reasons[1]


@pytest.mark.slow
def test_fsdp2_by_the_trainer_trains_as_one_process_and_goes_on(
    quick_python: str, one: Path, keys: list[str], tmp_path: Path
) -> None:
    """Weights, gradients and optimizer in parts; checkpoints of whole weights; a run cut short."""
    output, config = tmp_path / "sft", str(CONFIGS / "accelerate" / "fsdp2.yaml")
    words = [*keys, *ROWS, "--output", str(output)]
    jobs = ["cut", config, *words, "then", "forget", str(output), "2"]
    jobs += ["then", "cut", config, *words, "--resume"]
    run(quick_python, [*TORCHRUN, str(WORKER), *jobs])
    first = tmp_path / "sft.first"
    assert read_losses(first) == pytest.approx(read_losses(one), abs=TOLERANCE)
    assert largest_difference(one, first) < TOLERANCE
    assert largest_difference(one / "checkpoint-4", first / "checkpoint-4") < TOLERANCE
    assert largest_difference(first, output) == 0
    assert read_losses(output) == read_losses(first)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")
def test_preferences_in_two_processes_train_as_one(
    quick_python: str, tiny_repo: Path, tmp_path: Path
) -> None:
    """A reward model and DPO, whose pairs are shared out; both in the same two processes."""
    pytest.importorskip("trl")
    data, jobs = write_rows(tmp_path / "pairs.jsonl", make_pairs(range(16))), []
    for stage in ("reward", "dpo"):
        short = {"max_steps": STEPS, "save_steps": STEPS, "learning_rate": 1e-3}
        train(stage, tiny_repo, data, tmp_path / f"{stage}1", **short)
        forget_accelerator()
        short |= {"per_device_train_batch_size": 2}
        jobs += [*words(stage, tiny_repo, data, tmp_path / f"{stage}2", **short), "then"]
    run(quick_python, [*TORCHRUN, str(WORKER), *jobs[:-1]])
    for stage in ("reward", "dpo"):
        alone, together = (tmp_path / f"{stage}{count}" for count in (1, 2))
        assert read_losses(together) == pytest.approx(read_losses(alone), abs=TOLERANCE)
        assert share_of_the_way(tiny_repo, alone, together) < 5e-3
        assert len(set(read_losses(alone))) == STEPS


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed (DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install deepspeed)",
)
@pytest.mark.parametrize("name", ["zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_deepspeed_trains_as_one_process(
    quick_python: str, name: str, one: Path, keys: list[str], tmp_path: Path
) -> None:
    config = json.loads((CONFIGS / "deepspeed" / f"{name}.json").read_text())
    for part in ("offload_optimizer", "offload_param"):
        if part in config["zero_optimization"]:
            config["zero_optimization"][part]["pin_memory"] = False  # there is no GPU to copy to
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    output = tmp_path / "sft"
    words = [*keys, *ROWS, "--output", str(output), "--deepspeed", str(file)]
    run(quick_python, [*TORCHRUN, str(WORKER), "zero", *words])
    assert read_losses(output) == pytest.approx(read_losses(one), abs=1e-4)
    assert largest_difference(one, output) < 1e-4


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp2"])
def test_accelerate_reads_its_files(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    kinds = {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert str(config.distributed_type).endswith(kinds[name])
    assert config.num_processes == (1 if name == "one_gpu" else 8)


def test_the_launcher_asks_for_fsdp2(monkeypatch: pytest.MonkeyPatch, tiny_repo: Path) -> None:
    from accelerate.commands import launch
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = str(CONFIGS / "accelerate" / "fsdp2.yaml")
    words = ["--config_file", file, "--main_process_port", "0", "script.py"]
    args = launch.launch_command_parser().parse_args(words)
    args, _, _ = launch._validate_launch_command(args)
    assert args.use_fsdp
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.transformer_cls_names_to_wrap == ["GLMBlock"]
    assert str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"
    model = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)
    plugin.set_auto_wrap_policy(model)
    blocks = {type(block) for block in model.transformer.layers}
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == blocks


@pytest.mark.parametrize("by", ["launcher", "key"])
def test_parts_that_would_be_whole_are_refused(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs accelerate copies the model to each process where FSDP was asked for."""
    arguments = SimpleNamespace(world_size=2, fsdp=by == "key")
    trainer: Any = SimpleNamespace(is_fsdp_enabled=False, args=arguments)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true" if by == "launcher" else "false")
    with pytest.raises(ValueError, match="FSDP is asked for, and accelerate would train 2 whole"):
        check_parts(trainer)
    for change in ({"world_size": 1}, {"world_size": 2, "fsdp": []}):
        vars(arguments).update(change)
        if "fsdp" in change:
            monkeypatch.delenv("ACCELERATE_USE_FSDP")
        check_parts(trainer)
    vars(arguments).update(fsdp=True)
    trainer.is_fsdp_enabled = True
    check_parts(trainer)


def test_parts_of_a_model_answer_no_samples(tmp_path: Path) -> None:
    args = SimpleNamespace(disable_tqdm=True, metric_for_best_model=None)
    trainer: Any = SimpleNamespace(is_fsdp_enabled=True, args=args)
    settings = Settings(output=str(tmp_path), sample_prompts=["hello"])
    with pytest.raises(KeyProblem, match="has but a part of the weights under FSDP and ZeRO-3"):
        build_callbacks(settings, trainer)
    settings.sample_prompts = []
    assert build_callbacks(settings, trainer)
