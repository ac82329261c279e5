"""B4: `tp_plan="auto"` in several processes: plain weights are right, what cannot be is refused.

Packed weights were cut without their scales, and answered with other numbers or with none.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.configuration_chatglm import check_tensor_parallel
from conftest import ROOT, TOKENIZER_FILES, build_model
from transformers import AutoModel

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node"]
ON_THE_WAY = {"quantization_config": {"quant_method": "chatglm", "bits": 4}}


def run(tmp_path: Path, processes: int, jobs: list[tuple[Path, dict[str, Any]]]) -> Any:
    """Return what each process found of each job, `[process][job]`.

    Once a process was aborted by gloo when its work was done (SIGABRT, in CI). So processes that
    fail after all reports are written are run once more; an end before that is a failure.
    """
    done, files = start(processes, tmp_path / "reports", jobs)
    if done.returncode and all(file.exists() for file in files):
        done, files = start(processes, tmp_path / "again", jobs)
    missing = [file.name for file in files if not file.exists()]
    assert done.returncode == 0 and not missing, f"without {missing}: {done.stderr[-6000:]}"
    return [json.loads(file.read_text()) for file in files]


def start(
    processes: int, reports: Path, jobs: list[tuple[Path, dict[str, Any]]]
) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """Run the worker in several processes to their end; return that, and where reports are."""
    reports.mkdir()
    words = [str(reports), json.dumps([(str(folder), options) for folder, options in jobs])]
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, str(processes), str(WORKER), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done, [reports / f"{rank}.json" for rank in range(processes)]


@pytest.fixture(scope="module")
def reports(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of two processes: plain weights; packed folders of 4 and 8 bits; others on the way."""
    tmp_path, jobs = tmp_path_factory.mktemp("parallel"), [(tiny_repo, {})]
    for bits in (4, 8):
        model = AutoModel.from_pretrained(tiny_repo, trust_remote_code=True).quantize(bits)
        model.save_pretrained(tmp_path / str(bits))
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            (tmp_path / str(bits) / name).write_bytes((tiny_repo / name).read_bytes())
        jobs.append((tmp_path / str(bits), {}))
    jobs += [(tiny_repo, ON_THE_WAY), (tiny_repo, {"load_in_8bit": True})]
    jobs += [(tiny_repo, {"quantization_bit": 4}), (tiny_repo, {"pre_seq_len": 4})]
    return run(tmp_path, 2, jobs)


def test_plain_weights_in_parts_are_the_whole_model(reports: list[Any]) -> None:
    for process in reports:
        found = process[0]
        assert found["difference"] < 1e-4 * found["largest"]
        assert found["answers"][0] == found["answers"][1]
        for name in ("query_key_value", "dense"):  # transformers 4 leaves the feed-forward whole
            assert f"transformer.layers.1.attention.{name}.weight" in found["cut"]


def test_parts_are_not_quantized(reports: list[Any]) -> None:
    for process in reports:
        assert "query_key_value is shared out among processes" in process[0]["quantize"]
        assert "without tp_plan" in process[0]["quantize"]


@pytest.mark.parametrize(
    ("job", "bits"), [(1, 4), (2, 8), (3, 4), (4, 8), (5, 4)],
    ids=["4 bits", "8 bits", "quantization_config", "load_in_8bit", "quantization_bit"],
)  # fmt: skip
def test_packed_weights_are_refused_in_every_process(
    job: int, bits: int, reports: list[Any]
) -> None:
    for process in reports:
        assert process[job]["error"] == "ValueError"
        assert f"tp_plan cannot share out weights packed in {bits} bits" in process[job]["message"]
        assert 'device_map="auto"' in process[job]["message"]
        assert "\n" not in process[job]["message"]


def test_a_prefix_is_refused(reports: list[Any]) -> None:
    for process in reports:
        assert process[6]["error"] == "ValueError"
        assert "prefix of a P-Tuning model (pre_seq_len 4)" in process[6]["message"]


def test_heads_that_do_not_divide_are_refused(tiny_repo: Path, tmp_path: Path) -> None:
    for process in run(tmp_path, 3, [(tiny_repo, {})]):
        assert process[0]["error"] == "ValueError"
        assert "cannot share out 2 heads among 3 processes" in process[0]["message"]


def test_what_can_be_shared_out_is_not_refused() -> None:
    config = build_model(num_attention_heads=4).config
    for processes in (1, 2, 4):
        check_tensor_parallel(config, processes)
    with pytest.raises(ValueError, match="4 heads among 8 processes"):
        check_tensor_parallel(config, 8)


def test_a_layer_of_parts_is_not_packed() -> None:
    model = build_model()
    weight = model.transformer.layers[2].mlp.dense_4h_to_h.weight
    weight.placements = ("a stand-in for those of a DTensor",)
    with pytest.raises(ValueError, match="dense_4h_to_h is shared out among processes"):
        model.quantize(8)
    assert all(type(m) is torch.nn.Linear for m in (model.transformer.layers[0].mlp.dense_4h_to_h,))
