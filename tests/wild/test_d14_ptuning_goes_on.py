"""D14: prefixes that were trained before go on training, whoever wrote them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model

pytest.importorskip("chatglm", reason="needs the package")

from aligning import train, write_rows
from safetensors.torch import save_file
from torch import Tensor

from chatglm.cli import main

# Transformers 5.23 has new names for checkpointing; peft still says the old ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
    pytest.mark.usefixtures("pictures"),
]
PREFIX = "transformer.prefix_encoder."
ROWS = [{"prompt": f"{n} plus 1?", "response": f"{n + 1}"} for n in range(8)]
# Of a step so small the prefix that is written is the one that was read.
STILL = {"learning_rate": 1e-12, "max_steps": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def draw_prefix(
    length: int, projects: bool, hidden: int = 32, layers: int = 2
) -> dict[str, Tensor]:
    """The tensors of an encoder, by their names in it."""
    generator = torch.Generator().manual_seed(3)
    states = 2 * layers * hidden
    shapes = {"embedding.weight": (length, hidden if projects else states)}
    if projects:
        shapes |= {"trans.0.weight": (hidden, hidden), "trans.0.bias": (hidden,)}
        shapes |= {"trans.2.weight": (states, hidden), "trans.2.bias": (states,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_official(folder: Path, tensors: dict[str, Tensor], name: str = PREFIX) -> Path:
    """A checkpoint as the official scripts leave one: the prefix in half beside other files."""
    folder.mkdir(parents=True)
    torch.save({name + k: t.half() for k, t in tensors.items()}, folder / "pytorch_model.bin")
    fields = {"pre_seq_len": len(tensors["embedding.weight"]), "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "trainer_state.json").write_text("{}")
    return folder


def read_written(output: Path) -> dict[str, Tensor]:
    weights = torch.load(output / "pytorch_model.bin", weights_only=True)
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}


def go_on(repo: Path, data: Path, output: Path, adapter: Path, **keys: Any) -> dict[str, Tensor]:
    train("ptuning", repo, data, output, adapter=adapter, **keys)
    return read_written(output)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("projects", [False, True])
def test_an_official_checkpoint_goes_on(
    projects: bool, bits: int, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    start = draw_prefix(5, projects)
    folder = write_official(tmp_path / "checkpoint-3000", start)
    found = go_on(tiny_repo, data, tmp_path / "out", folder, bits=bits, **STILL)
    assert found.keys() == start.keys()
    for name, tensor in start.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor.half().float(), rtol=0, atol=1e-6)
    moved = go_on(tiny_repo, data, tmp_path / "far", folder, bits=bits, learning_rate=1e-2)
    assert all((moved[name] - found[name]).abs().max() > 1e-3 for name in found)
    written = json.loads((tmp_path / "far" / "config.json").read_text())
    assert (written["pre_seq_len"], written["prefix_projection"]) == (5, projects)


@pytest.mark.parametrize("name", ["", "prefix_encoder."])
def test_a_file_without_the_models_names_goes_on(
    name: str, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    start = draw_prefix(4, True)
    folder = write_official(tmp_path / "start", start, name)
    train("ptuning", tiny_repo, data, tmp_path / "out", ptuning_checkpoint=folder, **STILL)
    found = read_written(tmp_path / "out")
    torch.testing.assert_close(found["trans.2.weight"], start["trans.2.weight"].half().float())


def make_whole(repo: Path, folder: Path) -> dict[str, Tensor]:
    """A model folder that has a prefix of its own; returns the prefix."""
    shutil.copytree(repo, folder)
    fields = json.loads((folder / "config.json").read_text()) | {"pre_seq_len": 6}
    (folder / "config.json").write_text(json.dumps(fields))
    model = build_model(**{k: v for k, v in fields.items() if k != "torch_dtype"})
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    return model.transformer.prefix_encoder.state_dict()


@pytest.mark.parametrize("place", ["adapter", "model"])
def test_a_prefix_inside_a_whole_model_goes_on(
    place: str, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    start = make_whole(tiny_repo, tmp_path / "whole")
    folders = {"model": tiny_repo} | {place: tmp_path / "whole"}
    keys = {key: str(folder) for key, folder in folders.items()}
    train(
        "ptuning", data=data, output=tmp_path / "out", repo=Path(keys.pop("model")), **keys, **STILL
    )
    found = read_written(tmp_path / "out")
    torch.testing.assert_close(found["embedding.weight"], start["embedding.weight"])


@pytest.mark.parametrize("projects", [False, True])
def test_what_this_stage_wrote_goes_on(
    projects: bool, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    keys = {"pre_seq_len": 3, "prefix_projection": projects, "save_steps": 2, "max_steps": 2}
    train("ptuning", tiny_repo, data, tmp_path / "one", **keys)
    first = read_written(tmp_path / "one")
    for place in ("one", "one/checkpoint-2"):
        output = tmp_path / place.replace("/", "-")
        found = go_on(
            tiny_repo, data, output.with_name(output.name + "-on"), tmp_path / place, **STILL
        )
        assert found.keys() == first.keys()
        torch.testing.assert_close(found["embedding.weight"], first["embedding.weight"])


def test_pefts_folder_goes_on_without_the_network(
    tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    keys = {"pre_seq_len": 3, "prefix_projection": True}
    train("ptuning", tiny_repo, data, tmp_path / "one", **keys)
    start = read_written(tmp_path / "one")
    hidden = torch.tanh(
        start["embedding.weight"] @ start["trans.0.weight"].T + start["trans.0.bias"]
    )
    states = hidden @ start["trans.2.weight"].T + start["trans.2.bias"]
    found = go_on(tiny_repo, data, tmp_path / "two", tmp_path / "one" / "peft", **STILL)
    assert found.keys() == {"embedding.weight"}
    torch.testing.assert_close(found["embedding.weight"], states, rtol=1e-4, atol=1e-5)


def write_lora(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("start", "keys", "said"),
    [
        ({"length": 5, "projects": False}, {"pre_seq_len": 128}, "pre_seq_len is 128.* has 5"),
        ({"length": 5, "projects": False}, {"prefix_projection": True}, "projection is True"),
        ({"length": 5, "projects": True}, {"prefix_projection": False}, "projection is False"),
        (
            {"length": 5, "projects": False, "layers": 3},
            {},
            "192 numbers.*takes 128.*another model",
        ),
        ({"length": 5, "projects": True, "hidden": 64}, {}, "another model"),
        ({"length": 5, "projects": False}, {"lora_rank": 4}, "lora_rank.*stage sft"),
    ],
)
def test_what_contradicts_a_prefix_is_refused(
    start: dict[str, Any], keys: dict[str, Any], said: str,
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = write_official(tmp_path / "start", draw_prefix(**start))
    assert refuse(tiny_repo, data, tmp_path, folder, **keys) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(said, error)


def refuse(repo: Path, data: Path, tmp_path: Path, adapter: Path, **keys: Any) -> int:
    given = {"model": repo, "train_data": data, "output": tmp_path / "out", "adapter": adapter}
    given |= keys
    return main(["train", "ptuning", *(w for k, v in given.items() for w in (f"--{k}", str(v)))])


def test_a_folder_of_lora_or_of_nothing_is_refused(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refuse(tiny_repo, data, tmp_path, write_lora(tmp_path / "lora")) == 2
    assert "holds LORA and no prefix" in capsys.readouterr().err
    assert refuse(tiny_repo, data, tmp_path, tmp_path / "nowhere") == 2
    assert "nowhere is no folder" in capsys.readouterr().err
