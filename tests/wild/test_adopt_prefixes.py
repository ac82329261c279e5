"""P-Tuning: prefixes alone, inside their model, and from the official layout to peft's and back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build_model, import_from_package
from golden_model import load_arrays
from model_folders import THIN, change_json, old_name, read_json
from old_folders import (
    GOLDEN,
    OLD_MAP,
    list_folders,
    make_golden,
    make_packed,
    make_small,
    needs_shared,
    snapshot,
    write_json,
)
from safetensors.torch import load_file, save_file
from test_adopt_folders import load_by_hub, load_by_package, logits
from test_adopt_refusals import refused, run
from test_model_golden import assert_near
from transformers import AutoConfig, AutoModel, AutoTokenizer

door = import_from_package("chatglm.door")
START = "transformer.prefix_encoder."
LENGTH = 5
both = pytest.mark.parametrize("is_projected", [False, True], ids=["plain", "projected"])


def adopt(folder: Path, *words: str) -> None:
    code, _, err = run(["adopt", str(folder), *words])
    assert code == 0, err


def make_prefix(folder: Path, is_projected: bool, **fields: Any) -> dict[str, torch.Tensor]:
    """A checkpoint of the official script: the encoder's weights, the model's configuration."""
    folder.mkdir(parents=True)
    config = read_json(ROOT / "config.json") | THIN | {"pre_seq_len": LENGTH}
    config |= {"prefix_projection": is_projected, "auto_map": OLD_MAP, **fields}
    model = build_model(**{k: v for k, v in config.items() if k not in ("auto_map", "torch_dtype")})
    weights = {n: t.clone() for n, t in model.state_dict().items() if n.startswith(START)}
    torch.save(weights, folder / "pytorch_model.bin")
    write_json(folder / "config.json", config | {"_name_or_path": "THUDM/chatglm-6b"})
    write_json(folder / "trainer_state.json", {"global_step": 3})
    return weights


def load_as_the_guide_says(base: Path, prefix: Path) -> Any:
    """The official guide's way: the model with pre_seq_len, then the prefix's tensors."""
    fields = read_json(prefix / "config.json")
    options = {name: fields[name] for name in ("pre_seq_len", "prefix_projection")}
    with door.package_code():
        config = AutoConfig.from_pretrained(base, **options)
        model = AutoModel.from_pretrained(base, config=config).float()
    state = torch.load(prefix / "pytorch_model.bin", weights_only=True)
    model.transformer.prefix_encoder.load_state_dict(
        {name.removeprefix(START): tensor for name, tensor in state.items()}
    )
    return model.eval()


def load_by_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    with door.package_code():
        model = AutoModel.from_pretrained(base).float().eval()
    return PeftModel.from_pretrained(model, adapter).eval()


# A prefix alone


@old_name
@both
def test_a_prefix_alone_gets_peft_s_layout(tmp_path: Path, is_projected: bool) -> None:
    base, folder = make_small(tmp_path / "base"), tmp_path / "checkpoint-3"
    make_prefix(folder, is_projected)
    before = snapshot(folder)
    expected = logits(load_as_the_guide_says(base, folder))
    adopt(folder)
    assert snapshot(folder)["pytorch_model.bin"] == before["pytorch_model.bin"]
    fields = read_json(folder / "peft" / "adapter_config.json")
    assert (fields["num_virtual_tokens"], fields["base_model_name_or_path"]) == (
        LENGTH,
        "THUDM/chatglm-6b",
    )
    assert_near(logits(load_by_peft(base, folder / "peft")), expected)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.pre_seq_len, config.prefix_projection) == (LENGTH, is_projected)
    assert "ice_text.model" not in snapshot(folder)
    after = snapshot(folder)
    adopt(folder)
    assert snapshot(folder) == after
    adopt(folder, "--undo")
    assert snapshot(folder) == before and list_folders(folder) == set()


def test_a_prefix_alone_in_a_new_folder(tmp_path: Path) -> None:
    folder, new = tmp_path / "checkpoint-3", tmp_path / "new"
    make_prefix(folder, False)
    before = snapshot(folder)
    adopt(folder, "--out", str(new))
    assert snapshot(folder) == before
    adopt(folder)
    name = "peft/adapter_model.safetensors"
    assert snapshot(new)[name][0] == snapshot(folder)[name][0]
    assert "trainer_state.json" not in snapshot(new)
    assert cli_has_nothing_to_do(new)
    for place in (folder, folder / "peft"):
        told = refused(place, "--bits", "4", "--out", str(tmp_path / "packed"))
        assert "is a P-Tuning prefix and no model: put it into its model first, chatglm" in told


def test_what_the_stage_ptuning_writes_is_right_already(
    tiny_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the model's files are added; its own peft folder is the same prefix."""
    from chatglm.training.stages.ptuning import PtuningSettings, save_prefix

    settings = PtuningSettings(model=str(tiny_repo), output=str(tmp_path / "out"), pre_seq_len=4)
    (tmp_path / "out").mkdir()
    model = AutoModel.from_pretrained(tiny_repo, pre_seq_len=4, trust_remote_code=True)
    save_prefix(model, settings)
    before = snapshot(tmp_path / "out")
    adopt(tmp_path / "out")
    after = snapshot(tmp_path / "out")
    same = ("pytorch_model.bin", "peft/adapter_config.json", "peft/adapter_model.safetensors")
    assert all(after[name] == before[name] for name in (*same, "README.md"))
    # The same files as adopting makes of its prefix alone.
    shutil.copytree(tmp_path / "out", tmp_path / "alone", ignore=shutil.ignore_patterns("peft"))
    adopt(tmp_path / "alone")
    name = "peft/adapter_model.safetensors"
    assert snapshot(tmp_path / "alone")[name][0] == before[name][0]


def test_a_prefix_of_peft_s_gets_the_official_layout(tmp_path: Path) -> None:
    base, folder = make_small(tmp_path / "base"), tmp_path / "checkpoint-3"
    weights = make_prefix(folder, False)
    adopt(folder)
    adapter = folder / "peft"
    told = f"{adapter} is a prefix of peft's for THUDM/chatglm-6b, which is no folder on this mach"
    assert told in refused(adapter)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    before = snapshot(adapter)
    adopt(adapter)
    again = torch.load(adapter / "pytorch_model.bin", weights_only=True)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    first, second = (logits(load_as_the_guide_says(base, place)) for place in (folder, adapter))
    assert torch.equal(first, second)
    after = snapshot(adapter)
    adopt(adapter)
    assert snapshot(adapter) == after
    adopt(adapter, "--undo")
    assert snapshot(adapter) == before


# Inside its model


@both
@pytest.mark.parametrize("base", ["shards", "one file", "safetensors", "int4"])
def test_a_prefix_goes_into_its_model(tmp_path: Path, base: str, is_projected: bool) -> None:
    folder, new, prefix = tmp_path / "base", tmp_path / "new", tmp_path / "checkpoint-3"
    if base == "int4":
        make_packed(folder, 4, False)
    else:
        make_small(folder, shards=base == "shards")
    if base == "safetensors":
        state = torch.load(folder / "pytorch_model.bin", weights_only=True)
        save_file(
            {n: t.clone() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        (folder / "pytorch_model.bin").unlink()
    (folder / "README.md").write_text("the base's card\n")
    make_prefix(prefix, is_projected)
    before = snapshot(tmp_path)
    expected = load_as_the_guide_says(folder, prefix)
    adopt(folder, "--ptuning", str(prefix), "--out", str(new), "--dry-run")
    assert not new.exists()
    adopt(folder, "--ptuning", str(prefix), "--out", str(new))
    assert {n: s for n, s in snapshot(tmp_path).items() if not n.startswith("new/")} == before
    fields = read_json(new / "config.json")
    assert (fields["pre_seq_len"], fields["prefix_projection"]) == (LENGTH, is_projected)
    assert "checkpoint-3" in (new / "README.md").read_text()
    assert (new / "README.base.md").read_text() == "the base's card\n"
    for model in (load_by_hub(new), load_by_package(new)):
        half = {k: v.half().float() for k, v in expected.state_dict().items() if START in k}
        expected.load_state_dict(half, strict=False)
        assert_near(logits(model), logits(expected))
    tokenizer = AutoTokenizer.from_pretrained(new, trust_remote_code=True)
    assert model.chat(tokenizer, "你好", max_new_tokens=3)[1][0][0] == "你好"
    files = sorted(path.name for path in new.glob("*model-0*"))
    assert [new / name for name in files][-1].stat().st_nlink == 1
    assert all((new / name).stat().st_nlink == 2 for name in files[:-1]) and len(files) > 1
    assert cli_has_nothing_to_do(new)


def cli_has_nothing_to_do(folder: Path) -> bool:
    return "nothing to do" in run(["adopt", str(folder)])[1]


def test_a_prefix_of_peft_s_goes_into_its_model(tmp_path: Path) -> None:
    folder, prefix = make_small(tmp_path / "base"), tmp_path / "checkpoint-3"
    make_prefix(prefix, True)
    adopt(prefix)
    adopt(folder, "--ptuning", str(prefix / "peft"), "--out", str(tmp_path / "a"))
    adopt(folder, "--ptuning", str(prefix), "--out", str(tmp_path / "b"))
    first, second = (load_by_hub(tmp_path / name) for name in "ab")
    assert first.config.prefix_projection is False and second.config.prefix_projection is True
    assert_near(logits(first), logits(second), 1e-2)  # one of them is rounded before its network


@needs_shared
def test_logits_are_the_original_s(tmp_path: Path) -> None:
    """The golden prefix and its model, taken apart as the official scripts save them."""
    whole = make_golden(tmp_path / "whole", "prefix")
    folder, prefix = tmp_path / "base", tmp_path / "checkpoint-3"
    weights = load_file(GOLDEN / "model_late" / "prefix.safetensors")
    shutil.copytree(whole, folder)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    torch.save({n: t for n, t in weights.items() if START not in n}, folder / "pytorch_model.bin")
    change_json(folder / "config.json", pre_seq_len=None)
    prefix.mkdir()
    shutil.copy(whole / "config.json", prefix)
    torch.save({n: t for n, t in weights.items() if START in n}, prefix / "pytorch_model.bin")
    adopt(folder, "--ptuning", str(prefix), "--out", str(tmp_path / "new"))
    adopt(prefix)
    adopt(folder, "--ptuning", str(prefix / "peft"), "--out", str(tmp_path / "by-peft"))
    arrays = load_arrays(GOLDEN / "model_late", "prefix")
    for place in ("new", "by-peft"):
        model = load_by_hub(tmp_path / place)
        for prompt in json.loads((GOLDEN / "model_late" / "prefix.json").read_text())["prompts"]:
            with torch.no_grad():
                found = model(arrays[f"{prompt}/input_ids"]).logits
            assert_near(found, arrays[f"{prompt}/logits"])


# What does not go together


def test_prefixes_of_others_are_refused(tmp_path: Path) -> None:
    folder, prefix = make_small(tmp_path / "base"), tmp_path / "checkpoint-3"
    other, out = tmp_path / "other", ["--out", str(tmp_path / "new")]
    make_prefix(other, False, hidden_size=32, num_attention_heads=2)
    told = refused(folder, "--ptuning", str(other), *out)
    assert "the prefix has" in told and "and the model" in told
    adopt(other)
    told = refused(folder, "--ptuning", str(other / "peft"), *out)
    assert "has a prefix (5, 128), and this model takes 64 columns: it is one of another" in told
    assert "has no tensors transformer.prefix_encoder.* and is no prefix of peft's" in refused(
        folder, "--ptuning", str(folder), *out
    )
    make_prefix(prefix, False)
    assert "is a prefix itself: name the model that" in refused(
        prefix, "--ptuning", str(prefix), *out
    )
    whole = make_small(tmp_path / "whole", pre_seq_len=4)
    assert "has a prefix of its own (pre_seq_len=4): name the model without one" in refused(
        whole, "--ptuning", str(prefix), *out
    )
    assert not (tmp_path / "new").exists()
    broken = shutil.copytree(other / "peft", tmp_path / "broken")
    save_file({"x": torch.ones(1)}, broken / "adapter_model.safetensors")
    assert "holds x, and not a matrix prompt_embeddings" in refused(
        folder, "--ptuning", str(broken), *out
    )
    (broken / "adapter_model.safetensors").unlink()
    assert "has no weights: put adapter_model.safetensors or adapter_model.bin there" in refused(
        folder, "--ptuning", str(broken), *out
    )
