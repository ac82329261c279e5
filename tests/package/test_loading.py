"""`load_model` on a toy model folder whose own code is trusted, and on a real one."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModel, PreTrainedTokenizerFast

from chatglm import folder_code, loading
from chatglm.checkpoints.checksums import hash_file, write_sums
from chatglm.loading import choose_device, choose_dtype, default_model_folder, load_model

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = """
from transformers import PretrainedConfig


class ToyConfig(PretrainedConfig):
    model_type = "chatglm"

    def __init__(self, size=4, **kwargs):
        self.size = size
        super().__init__(**kwargs)
"""
MODEL = """
import torch
from transformers import PreTrainedModel

from .configuration_toy import ToyConfig


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = torch.nn.Linear(config.size, config.size, bias=False)
        self.second = torch.nn.Linear(config.size, 2, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.zeros_(module.weight)
"""
WEIGHTS = {"first.weight": torch.arange(16.0).view(4, 4), "second.weight": torch.ones(2, 4)}
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the first tensor into one shard and the others into a second, with their index."""
    first, *others = weights
    torch.save({first: weights[first]}, folder / SHARDS[0])
    torch.save({name: weights[name] for name in others}, folder / SHARDS[1])
    weight_map = dict.fromkeys(others, SHARDS[1]) | {first: SHARDS[0]}
    index = {"metadata": {"total_size": 96}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A model folder: configuration, code that the test trusts, tokenizer and two shards."""
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "configuration_toy.py").write_text(CONFIGURATION)
    (folder / "modeling_toy.py").write_text(MODEL)
    auto_map = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel"}
    config = {"model_type": "chatglm", "auto_map": auto_map, "size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    write_weights(folder, WEIGHTS)
    with folder_code():
        yield folder


def test_the_folder_s_own_model_and_tokenizer_come_back(folder: Path) -> None:
    model, tokenizer = load_model(folder, device="cpu")
    assert type(model).__name__ == "ToyModel" and not model.training
    assert {name: p.dtype for name, p in model.named_parameters()} == dict.fromkeys(
        WEIGHTS, torch.float32
    )
    for name, tensor in WEIGHTS.items():
        assert torch.equal(model.get_parameter(name), tensor)
    assert tokenizer("hello")["input_ids"] == [1]


def test_a_folder_may_be_given_as_text_relative_and_with_a_home(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert load_model(".", device="cpu")[0].config.size == 4
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert load_model("~/toy", device="cpu")[0].config.size == 4


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_number_format_is_the_one_asked_for(folder: Path, dtype: Any) -> None:
    model, _ = load_model(folder, device="cpu", dtype=dtype)
    assert model.first.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_quantized_while_they_are_read(bits: int, tiny_repo: Path) -> None:
    """From the stored weights, whatever the format of the rest is."""
    model, tokenizer = load_model(tiny_repo, bits=bits, device="cpu", dtype="bfloat16")
    plain = AutoModel.from_pretrained(tiny_repo, trust_remote_code=True, dtype=torch.float32)
    expected = plain.quantize(bits).to(torch.bfloat16).state_dict()
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert model.config.quantization_bit == bits
    assert not model.training
    assert type(tokenizer).__name__ == "ChatGLMTokenizer"


def flip_last_byte_of(file: Path, tensor: torch.Tensor) -> None:
    """Change a stored number, as a bad disk does."""
    content, stored = file.read_bytes(), tensor.numpy().tobytes()
    assert content.count(stored) == 1
    end = content.index(stored) + len(stored) - 1
    file.write_bytes(content[:end] + bytes([content[end] ^ 1]) + content[end + 1 :])


def write_all_sums(folder: Path) -> None:
    write_sums(folder, {file.name: hash_file(file) for file in folder.iterdir() if file.is_file()})


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_flipped_byte_loads_unless_it_is_verified(folder: Path, kind: str) -> None:
    name, damaged = SHARDS[1], "second.weight"
    if kind == "safetensors":
        for file in folder.glob("pytorch_model*"):
            file.unlink()
        name = "model.safetensors"
        save_file(WEIGHTS, folder / name, metadata={"format": "pt"})
    write_all_sums(folder)
    load_model(folder, device="cpu", verify=True)
    flip_last_byte_of(folder / name, WEIGHTS[damaged])
    model, _ = load_model(folder, device="cpu")
    assert not torch.equal(model.get_parameter(damaged), WEIGHTS[damaged])
    with pytest.raises(ValueError, match=rf"SHA256SUMS says \({name} damaged or changed\)"):
        load_model(folder, device="cpu", verify=True)


def test_sums_are_not_looked_at_unless_it_is_asked_for(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text("no sums\n")
    load_model(folder, device="cpu")
    with pytest.raises(ValueError, match=r"line 1 of .*SHA256SUMS is 'no sums'"):
        load_model(folder, device="cpu", verify=True)


def test_sums_without_a_shard_verify_nothing(folder: Path) -> None:
    write_sums(folder, {SHARDS[0]: hash_file(folder / SHARDS[0])})
    with pytest.raises(ValueError, match=f"does not name {SHARDS[1]}"):
        load_model(folder, device="cpu", verify=True)


def test_a_quantized_folder_keeps_its_bits(tiny_repo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_repo, tmp_path / "quantized")
    (folder / "config.json").unlink()
    model, _ = load_model(tiny_repo, bits=8, device="cpu")
    model.save_pretrained(folder)
    for bits in (None, 8):
        again, _ = load_model(folder, bits=bits, device="cpu")
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="quantized to 8 bits and cannot be quantized to 4 bits"):
        load_model(folder, bits=4, device="cpu")


@pytest.mark.parametrize("bits", [None, 4])
def test_another_architecture_is_refused(folder: Path, bits: int | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=f"{folder.name} is a model of type gpt2, and not the "):
        load_model(folder, bits=bits, device="cpu")


@pytest.mark.parametrize("bits", [0, 3, 16])
def test_wrong_bits_are_refused_before_anything_is_read(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 4 or 8, got {bits}"):
        load_model("nowhere", bits=bits)


def test_unknown_devices_and_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"device must be one of .*cpu.* here, got gpu"):
        load_model("nowhere", device="gpu")
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*, got int8"):
        load_model("nowhere", device="cpu", dtype="int8")


def test_folders_that_are_no_model_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is no folder"):
        load_model("nowhere")
    with pytest.raises(ValueError, match=r"it has no config.json"):
        load_model(folder.parent)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    with pytest.raises(ValueError, match=f"misses the shard {SHARDS[1]}"):
        load_model(folder)


def test_a_folder_without_weights_says_what_to_put_there(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ValueError, match=r"has 2 shards, .* and no index of them: fetch the"):
        load_model(folder)
    for shard in SHARDS:
        (folder / shard).unlink()
    with pytest.raises(ValueError, match=r"has no weights: put pytorch_model.bin.index.json"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"PK\3\4cut"])
def test_a_pointer_or_a_truncated_shard_is_named(folder: Path, content: bytes) -> None:
    (folder / SHARDS[0]).write_bytes(content)
    message = rf"{SHARDS[0]} \({len(content)} bytes\) is no complete weight file"
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_one_file_of_weights_is_enough_if_it_is_whole(folder: Path, name: str) -> None:
    for other in (*SHARDS, "pytorch_model.bin.index.json"):
        (folder / other).unlink()
    if name.endswith(".bin"):
        torch.save(WEIGHTS, folder / name)
    else:
        save_file(WEIGHTS, folder / name, metadata={"format": "pt"})
    model, _ = load_model(folder, device="cpu")
    assert torch.equal(model.first.weight, WEIGHTS["first.weight"])
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name} \(\d+ bytes\) is no complete weight file"):
        load_model(folder)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"first.weight": WEIGHTS["first.weight"]}, "the weights lack second.weight;"),
        (WEIGHTS | {"a": torch.ones(1), "b": torch.ones(1)}, "has no place for a and 1 more;"),
        (
            WEIGHTS | {"first.weight": torch.ones(3, 4)},
            r"first.weight in .* the sizes \(3, 4\), and not \(4, 4\);",
        ),
    ],
)
def test_weights_of_another_configuration_are_refused(
    folder: Path, weights: dict[str, torch.Tensor], problem: str
) -> None:
    write_weights(folder, weights)
    with pytest.raises(ValueError, match=problem):
        load_model(folder, device="cpu")


def test_too_little_memory_names_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "_read_model", fail)
    with pytest.raises(ValueError, match=r"does not fit .* cpu \(bits=None.*use 8 or 4 bits"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_best_device_is_the_default(
    cuda: bool, mps: bool, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    device = choose_device(None)
    assert device.type == best
    half, full = torch.float16, torch.float32
    assert choose_dtype(None, device) == (full if best == "cpu" else half)
    if cuda:
        assert choose_device("cuda:1") == torch.device("cuda", 1)
        with pytest.raises(ValueError, match=r"cuda, cuda:0, cuda:1, .*cpu here, got cuda:2"):
            choose_device("cuda:2")


def test_the_default_folder_is_the_repository_then_the_current_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading.model, "FOLDER", folder)
    monkeypatch.chdir(folder.parent)
    assert default_model_folder() == folder
    monkeypatch.setattr(loading.model, "FOLDER", folder.parent / "site" / "chatglm" / "model")
    with pytest.raises(ValueError, match=r"no model is named, .*: name one, `chatglm chat FOLDER`"):
        default_model_folder()
    monkeypatch.chdir(folder)
    assert default_model_folder() == Path.cwd()
