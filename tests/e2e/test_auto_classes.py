"""A model folder through transformers' Auto classes: load, save, place, shard, break."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from conftest import build_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

GENERATORS = (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM)
NAME = "transformer.layers.1.mlp.dense_h_to_4h.weight"


def load(folder: Path, auto_class: Any = AutoModel, **options: Any) -> Any:
    return auto_class.from_pretrained(folder, trust_remote_code=True, **options)


def prompt(folder: Path) -> torch.Tensor:
    return load(folder, AutoTokenizer)("你好, world", return_tensors="pt")["input_ids"]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def repo(tiny_repo: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; its name is new, so that its code is imported anew."""
    return Path(shutil.copytree(tiny_repo, tmp_path / tmp_path.name))


@pytest.mark.parametrize("auto_class", GENERATORS, ids=lambda c: c.__name__)
def test_classes_that_generate(tiny_repo: Path, auto_class: Any) -> None:
    model = load(tiny_repo, auto_class)
    assert type(model).__name__ == "ChatGLMForConditionalGeneration"
    assert not model.training
    assert model.dtype == torch.float32
    ids = prompt(tiny_repo)
    outputs = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert outputs.shape == (1, ids.shape[1] + 5)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    eos = model.generation_config.eos_token_id
    assert model.config.eos_token_id in (eos if isinstance(eos, list) else [eos])


def test_every_weight_is_loaded(tiny_repo: Path) -> None:
    model, report = load(tiny_repo, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(tiny_repo / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_config_and_tokenizer(tiny_repo: Path) -> None:
    config = load(tiny_repo, AutoConfig)
    tokenizer = load(tiny_repo, AutoTokenizer)
    assert (type(config).__name__, config.num_hidden_layers) == ("ChatGLMConfig", 2)
    assert type(tokenizer).__name__ == "ChatGLMTokenizer"
    for name in ("pad", "bos", "eos", "mask", "gmask"):
        assert getattr(config, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")
    model = load(tiny_repo, config=config)
    assert model.config.hidden_size == 32


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_classifier_on_the_same_weights(tiny_repo: Path, num_labels: int, tmp_path: Path) -> None:
    model = load(tiny_repo, AutoModelForSequenceClassification, num_labels=num_labels)
    ids = prompt(tiny_repo)
    expected = logits(model, ids)
    assert expected.shape == (1, num_labels)
    stored = load_file(tiny_repo / "model.safetensors")
    assert torch.equal(model.state_dict()[NAME], stored[NAME])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, AutoModelForSequenceClassification), ids), expected)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_save_and_reload(tiny_repo: Path, tmp_path: Path, shard: str) -> None:
    model, ids = load(tiny_repo), prompt(tiny_repo)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    load(tiny_repo, AutoTokenizer).save_pretrained(tmp_path)
    assert (len([*tmp_path.glob("model*.safetensors")]) > 1) is (shard == "20KB")
    names = {path.name for path in tmp_path.glob("*.py")}
    assert {path.name for path in tiny_repo.glob("*.py")} == names
    again = load(tmp_path)
    assert torch.equal(logits(again, prompt(tmp_path)), logits(model, ids))
    assert torch.equal(prompt(tmp_path), ids)
    assert again.lm_head.weight is again.transformer.word_embeddings.weight
    fields = json.loads((tiny_repo / "config.json").read_text())
    config = load(tmp_path, AutoConfig)
    for key in set(fields) - {"auto_map", "torch_dtype"}:
        assert getattr(config, key) == fields[key], key
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved["AutoModel"].split("--")[-1] == fields["auto_map"]["AutoModel"]


def save_bin_shards(folder: Path, extra: dict[str, torch.Tensor]) -> None:
    """Store the weights as old checkpoints do: pickled shards, an index, both tied matrices."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    weights |= extra
    (folder / "model.safetensors").unlink()
    shards, weight_map = [sorted(weights)[i::3] for i in range(3)], {}
    for i, names in enumerate(shards, 1):
        file = f"pytorch_model-{i:05d}-of-00003.bin"
        torch.save({name: weights[name].half() for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_old_checkpoints(repo: Path) -> None:
    """Pickled shards in half, rotary buffers among them, read with `weights_only`."""
    expected = logits(load(repo), prompt(repo))
    buffers = {
        f"transformer.layers.{i}.attention.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)
    }
    save_bin_shards(repo, buffers)
    (repo / "generation_config.json").unlink()  # the first checkpoints had none
    model, report = load(repo, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.allclose(logits(model, prompt(repo)), expected, atol=0.05)
    assert load(repo, dtype=torch.float16).dtype == torch.float16
    config = model.generation_config
    assert (config.eos_token_id, config.pad_token_id) == (model.config.eos_token_id, 3)


class Evil:
    """What no weight file may hold."""

    def __reduce__(self) -> Any:
        return print, ("run while loading",)


def test_pickles_with_code_are_refused(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_bin_shards(repo, {})
    file = repo / "pytorch_model-00002-of-00003.bin"
    torch.save({**torch.load(file), "evil": Evil()}, file)
    with pytest.raises(OSError, match=r"cannot be read: .*(GLOBAL print|checkpoint file)"):
        load(repo)
    assert "run while loading" not in capsys.readouterr().out


def test_an_untied_checkpoint_stays_untied(repo: Path) -> None:
    fields = json.loads((repo / "config.json").read_text()) | {"tie_word_embeddings": False}
    sizes = {k: v for k, v in fields.items() if k not in ("auto_map", "torch_dtype")}
    build_model(seed=1, **sizes).save_pretrained(repo)
    (repo / "config.json").write_text(json.dumps(fields))
    model = load(repo)
    stored = load_file(repo / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.transformer.word_embeddings.weight)
    model.save_pretrained(repo / "again")
    assert torch.equal(load(repo / "again").lm_head.weight, model.lm_head.weight)


def test_a_prefix_on_a_checkpoint_without_one(tiny_repo: Path, tmp_path: Path) -> None:
    """The new prefix is drawn from N(0, 1), and it alone is trained."""
    config = load(tiny_repo, AutoConfig, pre_seq_len=16)
    assert config.pre_seq_len == 16
    model = load(tiny_repo, config=config)
    prefix = model.transformer.prefix_encoder.embedding.weight
    assert prefix.shape == (16, 2 * 2 * 32)
    assert prefix.std().item() == pytest.approx(1, abs=0.1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"transformer.prefix_encoder.embedding.weight"}
    expected = logits(model, prompt(tiny_repo))
    assert not torch.allclose(expected, logits(load(tiny_repo), prompt(tiny_repo)), atol=1e-3)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again, prompt(tiny_repo)), expected)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained


def test_a_class_without_auto(tiny_repo: Path) -> None:
    ids = prompt(tiny_repo)
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_repo)
    assert torch.equal(logits(model, ids), logits(load(tiny_repo), ids))
    config = ChatGLMConfig.from_pretrained(tiny_repo, pre_seq_len=4)
    model, report = ChatGLMForConditionalGeneration.from_pretrained(
        tiny_repo, config=config, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"transformer.prefix_encoder.embedding.weight"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"transformer.prefix_encoder.embedding.weight"}


def test_a_prefix_with_its_projection(tiny_repo: Path) -> None:
    model = load(tiny_repo, pre_seq_len=16, prefix_projection=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 5
    assert all(name.startswith("transformer.prefix_encoder.") for name in trained)


@pytest.mark.parametrize("kind", ["auto", "split"])
def test_device_maps(tiny_repo: Path, tmp_path: Path, kind: str) -> None:
    """Half of the blocks stay on the disk."""
    split = {
        "transformer.word_embeddings": "cpu",
        "transformer.rotary_emb": "cpu",
        "transformer.layers.0": "disk",
        "transformer.layers.1": "cpu",
        "transformer.final_layernorm": "cpu",
        "lm_head": "cpu",
    }
    options = {"device_map": "auto"}
    if kind == "split":
        options = {"device_map": split, "offload_folder": str(tmp_path)}
    ids = prompt(tiny_repo)
    plain, placed = load(tiny_repo), load(tiny_repo, **options)
    assert torch.equal(logits(placed, ids), logits(plain, ids))
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(placed.generate(ids, **greedy), plain.generate(ids, **greedy))
    if kind == "split":
        assert placed.transformer.layers[0].mlp.dense_4h_to_h.weight.is_meta


def test_automatic_maps_keep_blocks_whole(tiny_repo: Path) -> None:
    from accelerate import infer_auto_device_map

    model = load(tiny_repo)
    size = sum(p.numel() * p.element_size() for p in model.transformer.layers[0].parameters())
    table = model.lm_head.weight.numel() * 4
    memory = {"cpu": table + int(1.5 * size) + 100, "disk": 10**9}
    places = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
    blocks = {key: value for key, value in places.items() if ".layers." in key}
    assert set(blocks) <= {"transformer.layers.0", "transformer.layers.1"}
    assert places


# --- what goes wrong


def test_a_missing_shard_is_named(repo: Path) -> None:
    save_bin_shards(repo, {})
    (repo / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(OSError, match=r"pytorch_model-00002-of-00003\.bin"):
        load(repo)


def test_missing_weights_are_named(repo: Path) -> None:
    (repo / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(repo)


def test_a_wrong_shape_is_named(repo: Path) -> None:
    """By the field that makes it, with both sizes and the remedy."""
    fields = json.loads((repo / "config.json").read_text()) | {"inner_hidden_size": 128}
    (repo / "config.json").write_text(json.dumps(fields))
    words = r"has inner_hidden_size 128, and the weights 64; use the config\.json that came"
    with pytest.raises(ValueError, match=words):
        load(repo)


def test_an_unknown_file_is_named(repo: Path) -> None:
    fields = json.loads((repo / "config.json").read_text())
    fields["auto_map"]["AutoModel"] = "modelling_chatglm.ChatGLMForConditionalGeneration"
    (repo / "config.json").write_text(json.dumps(fields))
    with pytest.raises(OSError, match=r"modelling_chatglm\.py"):
        load(repo)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="no-such-folder"):
        load(tmp_path / "no-such-folder")


# --- several devices at once


def test_the_tensor_parallel_plan_names_layers() -> None:
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    model = build_model()
    plan = getattr(model, "tp_plan", None) or model._tp_plan
    names = {
        f"transformer.{name}": style for name, style in model.config.base_model_tp_plan.items()
    }
    assert len(names) == 4
    for name, style in names.items():
        assert plan[name] == style and style in ALL_PARALLEL_STYLES
        for layer in range(model.config.num_layers):
            assert isinstance(model.get_submodule(name.replace("*", str(layer))), torch.nn.Linear)
