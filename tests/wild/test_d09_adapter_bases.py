"""D9: an adapter knows the base that it was trained on, and goes onto no other without being told.

`chatglm merge` of an adapter onto another base said "merged", and the fine-tuning below was lost.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("chatglm", reason="needs the package")

from adapter_folders import (
    QUERY,
    change_weights,
    read_origin,
    refuse,
    run,
    train_adapter,
    write_weights,
)
from model_folders import (
    Weights,
    change_json,
    copy_in_half,
    make_adapter,
    make_official,
    old_name,
    stored,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from wild_folders import make_shards

from chatglm.adapters.bases import check_base, find_base, read_foundations
from chatglm.adapters.digest import compare_digests, digest_folder, name_digest
from chatglm.converting.conversion import PackedFormat, merge_checkpoint, quantize_checkpoint

Capture = pytest.CaptureFixture[str]
pytestmark = [
    old_name,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]


@pytest.fixture(scope="module")
def workplace(
    tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory
) -> "Callable[[Path], Path]":
    """A base, an adapter of it (`sft`), and one on top of that (`ppo`), to be copied."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(tiny_repo, folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        train_adapter(patch, folder / "base", folder / "sft", save_steps=1)
        keys = {"adapter": folder / "sft", "lora_rank": 3, "learning_rate": 0.05}
        train_adapter(patch, folder / "base", folder / "ppo", **keys)

    def copy(target: Path) -> Path:
        return Path(shutil.copytree(folder, target / "copy"))

    return copy


@pytest.fixture
def place(workplace: Callable[[Path], Path], tmp_path: Path) -> Path:
    return workplace(tmp_path)


def differs(one: Path, other: Path) -> list[str]:
    return compare_digests(digest_folder(one), digest_folder(other)).parts


def test_a_digest_is_that_of_the_weights_in_any_layout(tiny_repo: Path, tmp_path: Path) -> None:
    half = copy_in_half(tiny_repo, tmp_path / "half")
    shards = make_shards(half, tmp_path / "shards", 3)
    assert differs(tiny_repo, half) == differs(half, shards) == []
    names = {name_digest(digest_folder(folder)) for folder in (tiny_repo, half, shards)}
    assert len(names) == 1
    for source in (tiny_repo, half):
        coarse = Path(shutil.copytree(source, tmp_path / f"coarse-{source.name}"))
        write_weights(coarse, {n: t.bfloat16() for n, t in stored(source).items()})
        assert differs(source, coarse) == []


def test_official_shards_have_the_digest_of_their_copy(tmp_path: Path) -> None:
    """With a head that is tied and written, and buffers that nobody reads."""
    make_official(tmp_path / "old", 130528)
    merge_checkpoint(tmp_path / "old", tmp_path / "new", None)
    assert differs(tmp_path / "old", tmp_path / "new") == []
    merge_checkpoint(tmp_path / "old", tmp_path / "bin", None, torch.float32, "bin")
    assert differs(tmp_path / "old", tmp_path / "bin") == []


@pytest.mark.parametrize(
    "names",
    [QUERY, "1.mlp.dense_h_to_4h.weight", "word_embeddings.weight", "final_layernorm.weight"],
)
def test_a_digest_tells_another_model_and_where(
    tiny_repo: Path, tmp_path: Path, names: str
) -> None:
    half = copy_in_half(tiny_repo, tmp_path / "half")
    other = change_weights(Path(shutil.copytree(half, tmp_path / "other")), names)
    (part,) = differs(half, other)
    assert names.endswith(part.split(".", 1)[-1]) and "layers" not in part
    assert differs(tiny_repo, other) == [part]


def test_a_digest_of_packed_weights_is_compared_as_far_as_it_can_be(
    tiny_repo: Path, tmp_path: Path
) -> None:
    packed, again = tmp_path / "packed", tmp_path / "again"
    for folder in (packed, again):
        quantize_checkpoint(tiny_repo, folder, PackedFormat(4))
    assert differs(packed, again) == []
    difference = compare_digests(digest_folder(tiny_repo), digest_folder(packed))
    assert difference.parts == [] and "attention.query_key_value.weight" in difference.unknown
    other = change_weights(copy_in_half(tiny_repo, tmp_path / "other"), "query_key_value.weight", 1)
    quantize_checkpoint(other, tmp_path / "other-packed", PackedFormat(4))
    parts = differs(packed, tmp_path / "other-packed")
    assert parts[0] == "attention.query_key_value.weight"


def test_an_adapter_is_written_with_its_base(place: Path) -> None:
    for folder in ("sft", "sft/checkpoint-1"):
        (base,) = read_foundations(place / folder) or []
        assert base.name == "base" and base.path.endswith("/base") and base.adapters == ()
        assert compare_digests(base.digest, digest_folder(place / "base")).parts == []
        PeftModel.from_pretrained(
            AutoModel.from_pretrained(place / "base", trust_remote_code=True), place / folder
        )
    (base,) = read_foundations(place / "ppo") or []
    assert [mark.name for mark in base.adapters] == ["sft"]


def test_another_base_is_refused(place: Path, tmp_path: Path, capsys: Capture) -> None:
    other = change_weights(Path(shutil.copytree(place / "base", place / "other")))
    command = ["merge", other, tmp_path / "new", "--lora", place / "sft"]
    told = refuse(capsys, *command)
    digest = name_digest(digest_folder(place / "base"))
    assert f"digest {digest}" in told and f"{other} differs from that in" in told
    assert "attention.query_key_value.weight" in told and told.endswith("any_base")
    assert not (tmp_path / "new").exists()
    code, _, told = run(capsys, *command, "--any-base")
    assert code == 0 and "taken all the same" in told and (tmp_path / "new").exists()
    told = refuse(
        capsys, "quantize", other, tmp_path / "int4", "--bits", 4, "--lora", place / "sft"
    )
    assert "differs from that in" in told


def test_a_fine_tuned_base_is_another_one(place: Path, tmp_path: Path, capsys: Capture) -> None:
    """The case that was lost: what was trained behind the fine-tuning, merged without it."""
    merged = tmp_path / "merged"
    merge_checkpoint(place / "base", merged, str(place / "sft"))
    with pytest.MonkeyPatch.context() as patch:
        train_adapter(patch, merged, tmp_path / "dpo")
    told = refuse(capsys, "merge", place / "base", tmp_path / "new", "--lora", tmp_path / "dpo")
    assert f"was trained on {merged}" in told
    both = [place / "sft", tmp_path / "dpo"]
    assert run(capsys, "merge", place / "base", tmp_path / "new", "--lora", *both)[0] == 0
    assert run(capsys, "merge", tmp_path / "one", "--lora", tmp_path / "dpo")[0] == 0
    assert_equal(stored(tmp_path / "one"), stored(tmp_path / "new"))


def test_of_an_adapter_without_a_record_is_said_that_nothing_is_known(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    (place / "sft" / "origin.json").unlink()
    change_json(place / "sft" / "adapter_config.json", base_model_name_or_path="THUDM/chatglm-6b")
    code, _, told = run(capsys, "merge", place / "base", tmp_path / "new", "--lora", place / "sft")
    assert code == 0 and "whether" in told and "is not known" in told and told.count("\n") == 0
    told = refuse(capsys, "merge", tmp_path / "more", "--lora", place / "sft")
    assert "THUDM/chatglm-6b, is not there any more: name the model's folder" in told


def test_without_a_record_the_folder_that_is_named_is_compared(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Adapters of peft, and those of before: their base may still lie where it was."""
    other = change_weights(Path(shutil.copytree(place / "base", place / "other")))
    make_adapter(place / "base", place / "lora")
    told = refuse(capsys, "merge", other, tmp_path / "new", "--lora", place / "lora")
    assert f"names {place / 'base'} as its base" in told
    assert run(capsys, "merge", tmp_path / "new", "--lora", place / "lora")[0] == 0


def test_the_base_is_that_of_the_adapter(
    place: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both orders of the words; where it was, beside the adapter, by a name without a place."""
    wanted = tmp_path / "wanted"
    merge_checkpoint(place / "base", wanted, str(place / "sft"))
    for number, command in enumerate(
        (["DST", "--lora", place / "sft"], ["--lora", place / "sft", "DST"])
    ):
        target = tmp_path / f"new{number}"
        code, _, told = run(capsys, "merge", *(target if w == "DST" else w for w in command))
        (base,) = read_foundations(place / "sft") or []
        assert code == 0 and told == f"chatglm: {place / 'sft'} is for {base.path}, which is taken"
        assert_equal(stored(target), stored(wanted))
    for folder in (place / "sft", place / "sft" / "checkpoint-1"):
        change_json(folder / "adapter_config.json", base_model_name_or_path="base")
        (folder / "origin.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert find_base(place / "sft") == place / "base"
    monkeypatch.chdir(place)
    assert find_base((place / "sft" / "checkpoint-1").resolve()) == place / "base"


def test_a_base_that_was_moved_or_replaced_is_told(place: Path, tmp_path: Path) -> None:
    original = Path((read_foundations(place / "sft") or [])[0].path)
    for file in (place / "sft" / "origin.json", place / "sft" / "adapter_config.json"):
        file.write_text(file.read_text().replace(str(original), str(tmp_path / "away" / "base")))
    assert find_base(place / "sft") == place / "base"
    change_weights(place / "base")
    with pytest.raises(ValueError, match=r"/base holds other weights: name the folder of the"):
        find_base(place / "sft")
    shutil.rmtree(place / "base")
    with pytest.raises(ValueError, match="away/base, is not there any more: name the model's"):
        find_base(place / "sft")


def test_a_chain_is_merged_whole_and_in_order(place: Path, tmp_path: Path, capsys: Capture) -> None:
    both = [place / "sft", place / "ppo"]
    told = refuse(capsys, "merge", place / "base", tmp_path / "new", "--lora", place / "ppo")
    assert "with sft on top, and here it would stand on" in told
    assert f"/sft {place / 'ppo'} in this order" in told
    told = refuse(capsys, "merge", place / "base", tmp_path / "new", "--lora", *both[::-1])
    assert "in this order" in told
    code, out, _ = run(capsys, "merge", place / "base", tmp_path / "new", "--lora", *both)
    assert code == 0 and out.endswith("MB\n")
    again = ["--lora", both[0], "--lora", both[1]]
    assert run(capsys, "merge", place / "base", tmp_path / "again", *again)[0] == 0
    wanted = merge_with_peft(place / "base", both, torch.float32)
    assert_equal(stored(tmp_path / "new"), wanted)
    assert_equal(stored(tmp_path / "again"), wanted)
    step = tmp_path / "step"
    assert run(capsys, "merge", place / "base", step, "--lora", both[0])[0] == 0
    assert run(capsys, "merge", step, tmp_path / "two", "--lora", both[1])[0] == 0
    assert_equal(stored(tmp_path / "two"), wanted)


def merge_with_peft(base: Path, adapters: list[Path], dtype: torch.dtype) -> Weights:
    """What peft makes of a chain, merged one after the other."""
    model: Any = AutoModel.from_pretrained(base, trust_remote_code=True, dtype=dtype)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}


def assert_equal(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


ALL = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stabilized": {"use_rslora": True, "target_modules": ALL},
    "dora": {"use_dora": True, "target_modules": ALL},
    "stabilized dora": {"use_dora": True, "use_rslora": True},
    "biases": {"bias": "all"},
    "biases of factors": {"lora_bias": True},
    "whole modules": {"modules_to_save": ["final_layernorm", "dense_4h_to_h"]},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"attention.dense": 5},
        "alpha_pattern": {"layers.1.attention.query_key_value": 11},
    },
}


HALF, COARSE, WIDE = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # of peft, of biases
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, HALF) for kind in KINDS), ("dora", COARSE), ("dora", WIDE), ("biases", COARSE)],
)
def test_every_kind_is_merged_as_peft_merges_it_in_a_chain(
    tiny_repo: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    base = Path(shutil.copytree(tiny_repo, tmp_path / "base"))
    write_weights(base, {name: tensor.to(dtype) for name, tensor in stored(base).items()})
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, options in zip(folders, ({}, KINDS[kind])):
        make_adapter(base, folder, **options)
    merge_checkpoint(base, tmp_path / "new", folders)
    wanted = merge_with_peft(base, folders, dtype)
    assert_equal(stored(tmp_path / "new"), wanted)
    only = merge_with_peft(base, folders[:1], dtype)
    assert any(not torch.equal(wanted[name], only[name]) for name in only)


def test_a_merged_or_packed_folder_says_what_it_was_made_of(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    """So an adapter goes onto the packed copy of its base without a word."""
    packed, merged = tmp_path / "packed", tmp_path / "merged"
    quantize_checkpoint(place / "base", packed, PackedFormat(4))
    assert check_base(place / "sft", packed) is None
    merge_checkpoint(place / "base", merged, place / "sft", torch.float16)
    assert [a["name"] for a in read_origin(merged)["bases"][0]["adapters"]] == ["sft"]
    assert check_base(place / "ppo", merged) is None
    with pytest.raises(ValueError, match="was trained on"):
        check_base(place / "sft", merged)
    change_weights(merged, "dense_h_to_4h.weight")  # trained further: it is that no more
    with pytest.raises(ValueError, match="was trained on"):
        check_base(place / "ppo", merged)
    (packed / "origin.json").unlink()
    note = check_base(place / "sft", packed)
    assert note is not None and "only what is not packed can be compared" in note


@pytest.mark.parametrize("content", ["{}", '{"bases": 1}', '{"bases": [{}]}', "[]", "{"])
def test_a_broken_record_is_named(place: Path, content: str, capsys: Capture) -> None:
    (place / "sft" / "origin.json").write_text(content)
    told = refuse(capsys, "merge", place / "base", place / "new", "--lora", place / "sft")
    assert "origin.json" in told


def test_a_prefix_and_a_reward_model_are_not_merged(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        prefix = train_adapter(patch, place / "base", tmp_path / "prefix", "ptuning", pre_seq_len=3)
    for folder in (prefix, prefix / "peft"):
        (base,) = read_foundations(folder) or []
        assert base.name == "base"
        told = refuse(capsys, "merge", place / "base", tmp_path / "new", "--lora", folder)
        assert f"chatglm adopt {place / 'base'} --ptuning {folder} --out NEW" in told
    change_json(place / "sft" / "adapter_config.json", task_type="SEQ_CLS")
    told = refuse(capsys, "merge", place / "base", tmp_path / "new", "--lora", place / "sft")
    assert "was trained for SEQ_CLS and CAUSAL_LM is wanted here" in told
    other = change_weights(Path(shutil.copytree(place / "base", place / "other")))
    told = refuse(capsys, "adopt", other, "--ptuning", prefix, "--out", tmp_path / "new")
    assert "differs from that in" in told


def test_json_of_a_record_is_small(place: Path) -> None:
    """The same size for 28 layers: tensors of one name are taken together."""
    text = (place / "ppo" / "origin.json").read_text()
    assert len(text) < 6000 and len(json.loads(text)["bases"][0]["digest"]) < 20


def test_a_look_at_an_adapter_tells_its_base(place: Path, tmp_path: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, "check", place / "ppo", "--json")
    report = json.loads(out)
    base = report["facts"]["base"]
    assert (code, report["problems"]) == (0, [])
    assert base["digest"] == name_digest(digest_folder(place / "base"))
    assert base["name"] == base["found"] and base["on_top_of"][0].endswith("/sft")
    code, out, _ = run(capsys, "check", place / "sft")
    assert code == 0 and f"digest {base['digest']}" in out
    here = str(Path(base["name"]).parent)
    for file in place.glob("*/*.json"):
        file.write_text(file.read_text().replace(here, str(place)))
    change_weights(place / "base")
    code, out, _ = run(capsys, "check", place / "sft")
    assert code == 1 and "differs from that in attention.query_key_value.weight" in out
    change_json(place / "base" / "config.json", inner_hidden_size=32)
    narrow = {n: t[:32] if "dense_h_to_4h" in n else t for n, t in stored(place / "base").items()}
    narrow = {n: t[:, :32] if "4h_to_h.weight" in n else t for n, t in narrow.items()}
    write_weights(place / "base", {n: t.contiguous() for n, t in narrow.items()})
    make_adapter(tmp_path / "copy" / "base", place / "lora", target_modules=["dense_h_to_4h"])
    lora = place / "lora" / "adapter_model.safetensors"
    assert run(capsys, "check", place / "lora", "--json")[0] == 0
    assert "is not known" not in run(capsys, "check", place / "lora")[1]
    wide = {n: t.repeat(2, 1) if "lora_B" in n else t for n, t in load_file(lora).items()}
    save_file(wide, lora)
    code, out, _ = run(capsys, "check", place / "lora")
    assert code == 1 and "has 64 columns for transformer.layers.0.mlp.dense_h_to_4h" in out
