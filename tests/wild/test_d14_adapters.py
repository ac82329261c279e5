"""D14: which layers get adapters, of what kind, and what is trained whole beside them.

What was trained loads through peft onto any copy of the base, and acts there as a slow computation
of its own says.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("chatglm", reason="needs the package")

from aligning import forget_accelerator, make_pairs, train, words, write_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from chatglm.cli import main
from chatglm.training.layers import LAYERS, expand_targets

# Transformers 5.23 has new names for checkpointing; peft and trl still say the old ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
    # peft's remark on tables that are one in the base and two under an adapter.
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer"),
    pytest.mark.usefixtures("pictures"),
]
PREFIX = "base_model.model."
IDS = torch.tensor([[5, 6, 7, 130, 40, 8]])
ROWS = [{"prompt": f"{n} plus 1?", "response": f"{n + 1}, yes."} for n in range(8)]
FAST = {"lora_rank": 4, "learning_rate": 3e-2, "max_steps": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def read_fields(output: Path) -> dict[str, Any]:
    return json.loads((output / "adapter_config.json").read_text())


def read_tensors(output: Path) -> dict[str, Tensor]:
    tensors = load_file(output / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ("all", LAYERS),
        ("all-linear", LAYERS),
        (["all", "dense"], LAYERS),
        ("query_key_value,dense", LAYERS[:2]),
        (" dense , dense_4h_to_h ,", ("dense", "dense_4h_to_h")),
        (["dense,query_key_value", "dense"], ("dense", "query_key_value")),
        ("attention.dense", ("attention.dense",)),
    ],
)
def test_layers_are_named_in_every_form(given: Any, layers: tuple[str, ...]) -> None:
    assert expand_targets([given] if isinstance(given, str) else given) == list(layers)


@pytest.mark.parametrize("key", ["lora_targets", "lora_target", "target_modules"])
def test_all_is_every_linear_layer_of_the_blocks(
    key: str, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    train("sft", tiny_repo, data, tmp_path / "out", **{**FAST, "max_steps": 1, key: "all"})
    adapted = {name.split(".lora_")[0] for name in read_tensors(tmp_path / "out")}
    model = load(tiny_repo)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert adapted == linear - {"lm_head"} and len(adapted) == 2 * len(LAYERS)


@torch.no_grad()
def merge_slowly(base: Any, tensors: dict[str, Tensor], scaling: float) -> Any:
    """Put adapters into the weights by the equations of LoRA and DoRA, row by row."""
    weights = dict(base.named_parameters())
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        weight = weights[f"{layer}.weight"]
        changed = weight + scaling * tensors[f"{layer}.lora_B.weight"] @ tensors[name]
        magnitude = tensors.get(f"{layer}.lora_magnitude_vector")
        for row in range(len(weight)):
            length = changed[row].square().sum().sqrt()
            weight[row] = changed[row] * (1 if magnitude is None else magnitude[row] / length)
    for name, tensor in tensors.items():
        if ".lora_" not in name:
            weights[name].copy_(tensor)
    return base


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "both": {"use_dora": True, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "norms": {"modules_to_save": ["final_layernorm,input_layernorm"]},
    "a whole layer": {"lora_targets": "dense,dense_4h_to_h", "modules_to_save": "query_key_value"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_act_as_their_equations_say(
    kind: str, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    keys = {"lora_targets": "all", "lora_alpha": 6, **KINDS[kind]}
    train("sft", tiny_repo, data, tmp_path / "out", **FAST, **keys)
    fields, tensors = read_fields(tmp_path / "out"), read_tensors(tmp_path / "out")
    assert any("magnitude" in name for name in tensors) == ("use_dora" in keys)
    assert fields["use_rslora"] == ("use_rslora" in keys)
    found = PeftModel.from_pretrained(load(tiny_repo), tmp_path / "out").eval()
    scaling = 6 / (4**0.5 if "use_rslora" in keys else 4)
    expected = logits_of(merge_slowly(load(tiny_repo), tensors, scaling))
    torch.testing.assert_close(logits_of(found), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits_of(load(tiny_repo))).abs().max() > 1e-2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["rslora", "norms", "tables"])
def test_over_packed_weights_the_same_is_trained(
    kind: str, bits: int, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    keys = KINDS.get(kind, {"modules_to_save": ["word_embeddings", "lm_head"]})
    train("sft", tiny_repo, data, tmp_path / "out", **FAST, **keys, lora_targets="all", bits=bits)
    packing = {"quant_method": "chatglm", "bits": bits}
    packed = load(tiny_repo, quantization_config=packing)
    found = logits_of(PeftModel.from_pretrained(packed, tmp_path / "out").eval())
    plain = load(tiny_repo, quantization_config=packing).dequantize()
    scaling = 8 / (4**0.5 if "use_rslora" in keys else 4)
    expected = logits_of(merge_slowly(untie(plain), read_tensors(tmp_path / "out"), scaling))
    # A CPU's kernels round what goes into packed products.
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    assert (expected - logits_of(load(tiny_repo))).abs().max() > 0.1


def untie(model: Any) -> Any:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize("modules", ["word_embeddings", "lm_head", "word_embeddings,lm_head"])
def test_tied_tables_are_trained_as_copies(
    modules: str, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    """Under the adapter each is what was trained of it; without it they are one again."""
    train("sft", tiny_repo, data, tmp_path / "out", **FAST, modules_to_save=modules)
    tensors = read_tensors(tmp_path / "out")
    assert {n.split(".")[-2] for n in tensors if ".lora_" not in n} == set(modules.split(","))
    found = PeftModel.from_pretrained(load(tiny_repo), tmp_path / "out").eval()
    expected = logits_of(merge_slowly(untie(load(tiny_repo)), tensors, 2))
    torch.testing.assert_close(logits_of(found), expected, rtol=1e-4, atol=1e-4)
    with found.disable_adapter():
        assert torch.equal(logits_of(found), logits_of(load(tiny_repo)))
    # Trained further, each table goes on from where it was.
    keys = {"adapter": tmp_path / "out", "learning_rate": 1e-12, "max_steps": 1}
    train("sft", tiny_repo, data, tmp_path / "on", **keys)
    for name, tensor in read_tensors(tmp_path / "on").items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("half", [{}, {"bf16": True}, {"bf16": True, "dtype": "bfloat16"}])
def test_samples_are_drawn_with_whole_tables(
    half: dict[str, Any], tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    """Answers are written outside of autocast, where every product has to be of one type."""
    keys = {"modules_to_save": "word_embeddings,lm_head,final_layernorm", "sample_steps": 3}
    keys |= {"sample_prompts": "1 plus 1?", "lora_targets": "all", **half}
    train("sft", tiny_repo, data, tmp_path / "out", **FAST, **keys)
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 1
    tables = [t for n, t in read_tensors(tmp_path / "out").items() if ".lora_" not in n]
    assert {t.dtype for t in tables} == {torch.bfloat16 if "dtype" in half else torch.float32}
    train("sft", tiny_repo, data, tmp_path / "on", adapter=tmp_path / "out", max_steps=1, **half)


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("reward", {"use_dora": True, "modules_to_save": "final_layernorm"}),
        ("dpo", {"use_dora": True, "modules_to_save": "final_layernorm"}),
        ("dpo", {"modules_to_save": "word_embeddings,lm_head"}),
        ("ppo", {"use_dora": True, "modules_to_save": "lm_head,final_layernorm"}),
    ],
)
def test_other_stages_train_them_too(
    stage: str, keys: dict[str, Any], tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    if stage != "ppo":
        pytest.importorskip("trl", reason="trl has no release for Python 3.10")
        data = write_rows(tmp_path / "pairs.jsonl", make_pairs(range(4)))
    else:
        (tmp_path / "judge.py").write_text("def f(p, a, r):\n    return [len(x) for x in a]\n")
        keys = {**keys, "reward_function": f"{tmp_path / 'judge.py'}:f", "num_mini_batches": 2}
        keys |= {"max_new_tokens": 4, "per_device_train_batch_size": 2}
    forget_accelerator()
    train(stage, tiny_repo, data, tmp_path / "out", **FAST, lora_targets="all", **keys)
    forget_accelerator()
    tensors = read_tensors(tmp_path / "out")
    before = load(tiny_repo).state_dict()
    whole = {n: t for n, t in tensors.items() if ".lora_" not in n and "score" not in n}
    assert whole and all(not torch.equal(t, before[n]) for n, t in whole.items())
    assert any("lora_B" in n and t.abs().max() > 0 for n, t in tensors.items())


def test_a_new_adapter_says_nothing_yet(tiny_repo: Path) -> None:
    from chatglm.training.models import load_policy
    from chatglm.training.settings import Settings

    for keys in KINDS.values():
        listed = {k: [v] if k.startswith(("lora_t", "mod")) and isinstance(v, str) else v
                  for k, v in keys.items()}  # fmt: skip
        settings = Settings(model=str(tiny_repo), output="out", lora_rank=4, **listed)
        settings.check()
        model = load_policy(settings).eval()
        torch.testing.assert_close(logits_of(model), logits_of(load(tiny_repo)), rtol=0, atol=1e-4)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lora_targets": "q_proj,v_proj"}, "names q_proj.* query_key_value, dense, dense_h_to_4h"),
    ({"lora_targets": "all,q_proj"}, None),
    ({"lora_targets": "lm_head"}, "lm_head.*modules_to_save trains it whole"),
    ({"lora_targets": "score"}, "score.*modules_to_save"),
    ({"lora_targets": ""}, "names no layer"),
    ({"lora_targets": "transformer.layers.7.attention.dense"}, "the model has no such module"),
    ({"modules_to_save": "embed_tokens"}, "names embed_tokens.*word_embeddings, lm_head"),
    ({"modules_to_save": "prefix_encoder"}, "names prefix_encoder"),
    ({"modules_to_save": "query_key_value"}, "in modules_to_save and in lora_targets"),
    ({"modules_to_save": "dense", "bits": 8}, "dense, whose weights are packed to 8 bits"),
    ({"additional_target": "nothing"}, "modules_to_save names nothing"),
    ({"use_dora": True, "bits": 4}, "use_dora.*bits=4 packs"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights must be true or gaussian.*pissa"),
    ({"init_lora_weights": "olora"}, "change the base"),
    ({"init_lora_weights": False}, "begin with noise, got False"),
    ({"use_dora": True, "lora_rank": 0}, "use_dora belongs to adapters: set lora_rank"),
    ({"use_rslora": True, "lora_rank": 0}, "use_rslora belongs to adapters"),
    ({"modules_to_save": "lm_head", "lora_rank": 0}, "modules_to_save belongs to adapters"),
]


@pytest.mark.parametrize(("keys", "said"), [pair for pair in REFUSED if pair[1]])
def test_what_cannot_be_trained_is_refused_in_a_line(
    keys: dict[str, Any], said: str,
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(words("sft", tiny_repo, data, tmp_path / "out", **{**FAST, **keys})) == 2
    *told, error = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, error), error
    # Only the model itself says how many blocks it has; it is loaded behind the rows.
    assert not told or "layers.7" in error


@pytest.mark.parametrize(
    ("keys", "embeddings", "said"),
    [
        ({"use_dora": True}, False, "use_dora needs the weights of query_key_value"),
        ({"modules_to_save": "dense"}, False, "modules_to_save needs the weights of dense"),
        ({"modules_to_save": "word_embeddings"}, True, "needs the weights of word_embeddings"),
    ],
)
def test_a_packed_folder_is_no_base_for_what_needs_its_weights(
    keys: dict[str, Any], embeddings: bool, said: str,
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["quantize", str(tiny_repo), str(tmp_path / "packed"), "--bits", "4"]
    assert main([*command, *(["--embeddings"] if embeddings else [])]) == 0
    capsys.readouterr()
    assert main(words("sft", tmp_path / "packed", data, tmp_path / "out", **FAST, **keys)) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and said in error


def test_keys_that_contradict_an_adapter_are_refused(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"lora_targets": "dense", "use_rslora": True, "modules_to_save": "final_layernorm"}
    train("sft", tiny_repo, data, tmp_path / "one", **{**FAST, "max_steps": 1}, **keys)
    cases = {"lora_alpha": (3, "have 8"), "use_dora": (True, "False")}
    cases |= {"lora_targets": ("all", "have dense"), "modules_to_save": ("lm_head", "have final")}
    for number, (key, (value, said)) in enumerate(cases.items()):
        given = {"adapter": tmp_path / "one", key: value, "max_steps": 1}
        capsys.readouterr()
        assert main(words("sft", tiny_repo, data, tmp_path / f"two{number}", **given)) == 2
        error = capsys.readouterr().err
        assert f"{key} is " in error and said in error
    train("sft", tiny_repo, data, tmp_path / "on", adapter=tmp_path / "one", max_steps=1, **keys)


def test_the_card_says_what_was_trained(tiny_repo: Path, data: Path, tmp_path: Path) -> None:
    keys = {"use_dora": True, "lora_targets": "all", "modules_to_save": "final_layernorm"}
    train("sft", tiny_repo, data, tmp_path / "out", **{**FAST, "max_steps": 1}, **keys)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "DoRA adapter for" in card and "- dora" in card
    for key in ("use_dora", "lora_targets", "modules_to_save"):
        assert key in card


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("stores_both", [False, True])
def test_no_merge_loses_a_table(
    stores_both: bool,
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Tables that were one matrix are two behind the training, which no tied folder can hold."""
    base = shutil.copytree(tiny_repo, tmp_path / "base")
    if stores_both:  # as the official shards
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    train("sft", base, data, tmp_path / "out", **FAST, modules_to_save="word_embeddings,lm_head")
    capsys.readouterr()
    command = ["merge", str(base), str(tmp_path / "merged"), "--lora", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "merge the adapter with peft" in error
    adapted = PeftModel.from_pretrained(load(base), tmp_path / "out").eval()
    expected = logits_of(adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "by_peft")
    found = logits_of(load(tmp_path / "by_peft"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
