"""Folders whose files do not go together, or are broken: one line by every door, and no memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from model_folders import change_json, read_json, stored
from transformers import AutoModel, AutoModelForCausalLM

from chatglm import cli, folder_code
from chatglm.checkpoints.reading import check_fit, list_weight_files
from chatglm.door import package_code

INDEX = "pytorch_model.bin.index.json"
SHARD = "pytorch_model-00001.bin"
MEGABYTES = 400  # a sixtieth of the 6B model in float32, and more than imports of libraries take


@pytest.fixture
def folder(tiny_repo: Path, tmp_path: Path) -> Path:
    """A model folder of our own to change, with one torch shard and its index."""
    folder = shutil.copytree(tiny_repo, tmp_path / "model")
    weights = stored(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / SHARD)
    write_map(folder, dict.fromkeys(weights, SHARD))
    return folder


def write_map(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def field(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **fields)


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: folder.joinpath(name).write_text(content) and None


def mapped(weight_map: Any) -> Callable[[Path], None]:
    return lambda folder: write_map(folder, weight_map)


def load_by_hub(folder: Path, **options: Any) -> Any:
    with folder_code():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def load_packed_by_hub(folder: Path) -> Any:
    return load_by_hub(folder, quantization_config={"quant_method": "chatglm", "bits": 4})


def load_by_package(folder: Path) -> Any:
    with package_code():
        return AutoModel.from_pretrained(folder)


DOORS = (load_by_hub, load_packed_by_hub, load_by_package)
NUMBER = "must be a whole number of at least"
# What the classes of the model refuse, by any door: settings, and weights of another model.
OF_THE_MODEL: dict[str, tuple[Callable[[Path], None], str]] = {
    "vocab_size": (field(vocab_size=8200), "has vocab_size 8200, and the weights 8192; use"),
    "hidden_size": (field(hidden_size=64), "has hidden_size 64, and the weights 32; use"),
    "inner_hidden_size": (field(inner_hidden_size=32), "inner_hidden_size 32, and the weights 64"),
    "more blocks": (field(num_layers=3), "has num_layers 3, and the weights 2; use the config.js"),
    "fewer blocks": (field(num_layers=1), "has num_layers 1, and the weights 2; use the config.js"),
    "text for an id": (field(eos_token_id="x"), rf"eos_token_id {NUMBER} 0 and .*got 'x'; use the"),
    "an id too large": (field(pad_token_id=8192), r"pad_token_id .*vocab_size \(8192\), got 8192"),
    "text for a size": (field(num_layers="2"), f"num_layers {NUMBER} 1, got '2'; use the config"),
    "no blocks": (field(num_layers=0), f"num_layers {NUMBER} 1, got 0; use the config.json"),
    "no heads": (field(num_attention_heads=0), f"num_attention_heads {NUMBER} 1, got 0; use"),
    "no window": (field(max_sequence_length=None), f"max_sequence_length {NUMBER} 1, got None"),
    "text for epsilon": (
        field(layernorm_epsilon="x"),
        "layernorm_epsilon must be a number ab",
    ),
    "index of nothing": (text(INDEX, "{}"), f"{INDEX} has the weight_map None, which leads to no"),
    "index in a list": (text(INDEX, "[]"), f"{INDEX} holds a list, and not fields by name; fetch"),
    "index cut off": (text(INDEX, '{"weight_map'), f"{INDEX} is no JSON file: Unterminated"),
    "map in a list": (mapped(["a"]), rf"{INDEX} has the weight_map \['a'\], which leads to no"),
    "map of numbers": (mapped({"a": 3}), f"{INDEX} puts a into 3, and shards lie beside it"),
    "map outside": (mapped({"a": "../b.bin"}), f"{INDEX} puts a into '../b.bin', and shards lie"),
    "generation list": (
        text("generation_config.json", "[]"),
        "ion_config.json holds a list",
    ),
    "generation cut": (text("generation_config.json", "{"), "generation_config.json is no JSON"),
    "pointer": (text(SHARD, "version https://git-lfs"), f"{SHARD} cannot be read: .*git lfs pull"),
}
# What transformers reads before any class of a folder is known, or the package alone looks at.
OF_THE_PACKAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "list": (text("config.json", "[]"), "config.json holds a list, and not fields by name; fetch"),
    "cut off": (text("config.json", '{"a'), "config.json is no JSON file: Unterminated string"),
    "text for bits": (field(quantization_bit="four"), "config.json has quantization_bit='four', w"),
    "list for rows": (field(vocab_size=[1]), r"config.json has vocab_size=\[1\], which is no whol"),
}
OF_THE_TOKENIZER: dict[str, tuple[Callable[[Path], None], str]] = {
    "list": (
        text("tokenizer_config.json", "[]"),
        "tokenizer_config.json holds a list, and",
    ),
    "cut off": (text("tokenizer_config.json", "{"), "tokenizer_config.json is no JSON file: Expec"),
}


@pytest.mark.parametrize("case", OF_THE_MODEL)
def test_each_door_names_what_is_wrong(folder: Path, case: str) -> None:
    spoil, message = OF_THE_MODEL[case]
    for load in DOORS:
        load(folder)
    spoil(folder)
    for load in DOORS:
        with pytest.raises(ValueError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def list_commands(folder: Path) -> list[list[str]]:
    """One command line of each kind that reads a model folder."""
    lora, rows = folder.parent / "lora", folder.parent / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    out = str(folder.parent / "out")
    train = ["train", "sft", "--model", str(folder), "--train_file", str(rows)]
    return [
        ["chat", str(folder), "--device", "cpu"],
        ["chat", str(folder), "--device", "cpu", "--bits", "4"],
        ["quantize", str(folder), out, "--bits", "4"],
        ["merge", str(folder), out, "--lora", str(lora)],
        [*train, "--output_dir", out, "--report_to", "none"],
    ]


COMMAND_CASES = {
    **{name: OF_THE_MODEL[name] for name in ("vocab_size", "more blocks", "text for an id")},
    **{name: OF_THE_MODEL[name] for name in ("index of nothing", "map outside", "generation cut")},
    **{f"config {name}": case for name, case in OF_THE_PACKAGE.items()},
    **{f"tokenizer {name}": case for name, case in OF_THE_TOKENIZER.items()},
}


@pytest.mark.parametrize("case", COMMAND_CASES)
def test_each_command_says_so_in_one_line(
    folder: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = COMMAND_CASES[case]
    spoil(folder)
    for command in list_commands(folder):
        assert cli.main(command) == 2, command
        error = capsys.readouterr().err
        line = error.splitlines()[-1]
        assert "Traceback" not in error and line.startswith("chatglm: ")
        with pytest.raises(ValueError, match=message):
            raise ValueError(line)


# The test's model is as large as the weights; what is refused would be 12 GB in half.
MEASURED = f"""
import io, json, resource, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "package")!r}]
from chatglm import cli
import conftest
import test_wrong_folders as doors

folder = Path(sys.argv[1])
for load in doors.DOORS:
    load(folder)
first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, size + 2**32))
full = Path({str(ROOT / "chatglm" / "presets" / "chatglm-6b" / "config.json")!r})
(folder / "config.json").write_text(full.read_text())
errors = []
for load in doors.DOORS:
    try:
        load(folder)
    except ValueError as error:
        errors.append(str(error))
for command in doors.list_commands(folder):
    sys.stderr = io.StringIO()
    assert cli.main(command) == 2
    errors.append(sys.stderr.getvalue())
last = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([errors, (last - first) // 1024]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by /proc")
def test_a_6b_configuration_beside_other_weights_takes_no_memory(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    errors, grown = json.loads(done.stdout.splitlines()[-1])
    sizes = "vocab_size 130528, hidden_size 4096, inner_hidden_size 16384, num_layers 28"
    assert [f"{sizes}, and the weights 8192, 32, 64, 2; use the" in error for error in errors] == (
        [True] * 8
    )
    assert grown < MEGABYTES


def test_names_are_told_before_sizes_and_both_before_values(folder: Path) -> None:
    """A prefix that only the configuration has, or only the weights, is refused by `load_model`."""
    assert list_weight_files(folder) == [SHARD]
    check_fit(folder)
    change_json(folder / "config.json", pre_seq_len=4)
    with pytest.raises(ValueError, match=r"lack transformer\.prefix_encoder\.emb"):
        check_fit(folder)
    load_by_hub(folder)  # a new prefix, to be trained
    change_json(folder / "config.json", pre_seq_len=None)
    weights = torch.load(folder / SHARD, weights_only=True)
    name = "transformer.prefix_encoder.embedding.weight"
    torch.save(weights | {name: torch.ones(4, 128)}, folder / SHARD)
    with pytest.raises(ValueError, match=f"the model has no place for {name}; use"):
        check_fit(folder)
    assert read_json(folder / "config.json")["pre_seq_len"] is None


def test_new_weights_are_begun_with_on_request(folder: Path) -> None:
    change_json(folder / "config.json", num_layers=3, inner_hidden_size=128)
    model = load_by_hub(folder, ignore_mismatched_sizes=True)
    assert len(model.transformer.layers) == 3
    weights = torch.load(folder / SHARD, weights_only=True)
    name = "transformer.layers.1.attention.dense.weight"
    assert torch.equal(model.state_dict()[name], weights[name])
