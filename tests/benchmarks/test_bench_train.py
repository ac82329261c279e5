"""`chatglm bench --train` and the training benchmark, at tiny sizes."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_train
from benchmarks.results import read_rows
from benchmarks.train_contender import Setting, Trainee, build_ours, build_plain
from benchmarks.workers import Worker
from chatglm.benching import command, training

# Transformers 5.23 has new names for checkpointing; peft still says the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

TINY = Setting("full", 2, 96, 64, half=False, device="cpu", checkpointing=False)
PROBE = """
from benchmarks.serving import serve

class Probe:
    def describe(self):
        return {"versions": "none"}
    def read(self):
        return {"rate": 2e9}

serve(Probe)
"""


def draw_rows() -> dict[str, torch.Tensor]:
    config = argparse.Namespace(**TINY.config)
    return training.draw_rows(config, 24, 2, torch.device("cpu"))


def compute_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients, by the last words of their names."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # a new one is 0, and hides the other matrix
            parameter.data.fill_(0.01)
        elif "lora_A" in name:
            parameter.data.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    loss = model.train()(**draw_rows()).loss
    loss.backward()
    names = ((".".join(n.split(".")[-3:]), p) for n, p in reversed([*model.named_parameters()]))
    return loss.item(), {name: p.grad for name, p in names if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", command.METHODS)
def test_the_plain_model_is_ours(method: str, checkpointing: bool) -> None:
    setting = TINY._replace(method=method, checkpointing=checkpointing)
    loss, gradients = compute_gradients(build_ours(setting))
    plain_loss, plain_gradients = compute_gradients(build_plain(setting))
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    if method == "full":  # the blocks' names differ by what holds the layers
        gradients, plain_gradients = (
            {name.split(".", 1)[-1]: g for name, g in grads.items() if "query_key_value" in name}
            for grads in (gradients, plain_gradients)
        )
    assert gradients.keys() == plain_gradients.keys() and gradients
    for name, gradient in gradients.items():
        expected = plain_gradients[name]
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


def test_a_step_moves_what_is_trained_and_nothing_else() -> None:
    trainee = Trainee("ours", TINY._replace(method="qlora"), torch.get_num_threads())
    before = {name: p.clone() for name, p in trainee.model.named_parameters()}
    answer = trainee.train(length=24, batch=2)
    assert answer["seconds"] > 0 and answer["peak"] > 10**8
    moved = {n for n, p in trainee.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)


def test_contenders_are_measured_side_by_side(
    quick_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.csv"
    probe = [sys.executable, "-c", PROBE]
    monkeypatch.setattr(bench_train, "RESULTS", path)
    monkeypatch.setattr(bench_train, "start_probe", lambda threads: Worker("probe", probe))
    monkeypatch.setattr(sys, "executable", quick_python)
    words = "--methods lora --layers 1 --vocabulary 96 --hidden 64 --length 16 --batch 2 --rounds 3"
    assert bench_train.main([*words.split(), "--threads", "1", "--write"]) == 0
    rows = {(row.contender, row.unit): row for row in read_rows(path)}
    assert rows.keys() == {(n, u) for n in ("ours", "torch and peft") for u in ("tokens/s", "GB")}
    ours = rows["ours", "tokens/s"]
    assert (ours.case, ours.size, ours.batch, ours.layers) == ("lora, float32", 16, 2, 1)
    assert ours.baseline == "torch and peft" and (ours.ratio or 0) > 0
    assert 0.05 < rows["ours", "GB"].value < 20


def test_a_contender_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = [sys.executable, "-c", PROBE]
    monkeypatch.setattr(bench_train, "start_probe", lambda threads: Worker("probe", probe))
    monkeypatch.setattr(
        bench_train,
        "start_contender",
        lambda name, *_: Worker(name, [sys.executable, "-c", "raise SystemExit(3)"]),
    )
    assert bench_train.main(["--methods", "full"]) == 2
    assert capsys.readouterr().err == "bench_train: ours ended with exit code 3\n"


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.make_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *words])


@pytest.mark.parametrize(
    ("method", "words", "bits", "share"),
    [("full", [], 0, 1.0), ("lora", [], 0, 0.01), ("qlora", ["--bits", "8"], 8, 0.01)],
)
def test_the_command_measures_a_training(
    tiny_repo: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    words: list[str],
    bits: int,
    share: float,
) -> None:
    threads = torch.get_num_threads()
    options = ["--train", method, "--length", "12", "--batch", "2", "--threads", "1", *words]
    assert command.main(parse(str(tiny_repo), "--device", "cpu", "--json", *options)) == 0
    torch.set_num_threads(threads)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (report["bits"], report["dtype"], report["train"]) == (bits, "float32", method)
    assert report["tokens_per_second"] == pytest.approx(24 / report["step_seconds"])
    assert 0 < report["trained"] <= share * report["parameters"]
    assert report["peak_bytes"] > 10**8


def test_the_report_is_for_people() -> None:
    head = ("a/model", "qlora", 4, "cuda", "bfloat16", 2, 256, 4, 6_000_000, 12_000)
    report = training.TrainingReport(*head, 1.5, 0.5, 4 * 10**9, {"torch": "2"})
    lines = training.format_report(report).splitlines()
    assert lines[0] == "a/model (training: qlora over 4 bits; cuda, bfloat16, threads: 2)"
    assert lines[1] == "load     1.50 s"
    assert lines[2] == "trained  12,000 of 6,000,000 numbers"
    assert lines[3] == "step     500.0 ms, 2048.0 tokens/s (4 x 256 tokens), peak memory 4.00 GB"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", "lora", "--bits", "4"], "--bits 4 goes with --train qlora"),
        (["--train", "full", "--dtype", "float16"], "float32 or bfloat16, got float16"),
        (["--train", "full", "--length", "3"], "a row has 4 tokens or more, got 3"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny_repo: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(parse(str(tiny_repo), "--device", "cpu", *words))


def test_half_is_chosen_by_the_device() -> None:
    assert training.choose_compute_dtype(None, torch.device("cpu")) is None
    assert training.choose_compute_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert training.choose_compute_dtype("float32", torch.device("cuda")) is None
