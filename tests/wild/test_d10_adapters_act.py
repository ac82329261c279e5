"""D10: what was trained is talked to, measured and trained further by naming it: `--adapter DIR`.

There was no way to chat with an adapter or a prefix, and their folders as models gave errors that
led nowhere.
"""

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("chatglm", reason="needs the package")

from adapter_folders import (
    ROWS,
    ask,
    change_weights,
    read_origin,
    refuse,
    run,
    train_adapter,
)
from aligning import write_rows
from model_folders import change_json, old_name, stored
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from chatglm.adapters.kinds import Stack, stack_adapters
from chatglm.converting.conversion import PackedFormat, merge_checkpoint, quantize_checkpoint
from chatglm.door import package_code
from chatglm.loading import load_model

Capture = pytest.CaptureFixture[str]
QUESTION = "is 3 good?"
BRIEF: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
pytestmark = [
    old_name,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]


@pytest.fixture(scope="module")
def place(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of each kind, `ppo` on top of `sft`. Do not change it."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(tiny_repo, folder / "base")
    quick = {"learning_rate": 0.3, "max_steps": 4}
    with pytest.MonkeyPatch.context() as patch:
        train_adapter(patch, folder / "base", folder / "sft", **quick)
        on_top = {"adapter": folder / "sft", "lora_rank": 3, **quick}
        train_adapter(patch, folder / "base", folder / "ppo", **on_top)
        prefix = {"pre_seq_len": 4, "learning_rate": 30.0, "max_steps": 4}
        train_adapter(patch, folder / "base", folder / "prefix", "ptuning", **prefix)
    return folder


def load(stack: Stack | None, folder: Path, bits: int | None = None) -> Any:
    return load_model(folder, bits, "cpu", "float32", adapters=stack)


def ask_all(loaded: tuple[Any, Any]) -> str:
    """The answer of all methods, which is one, but for half of a character at its end."""
    model, tokenizer = loaded
    inputs = tokenizer(QUESTION, return_tensors="pt")
    answers = {
        model.chat(tokenizer, QUESTION, **BRIEF)[0],
        list(model.stream_chat(tokenizer, QUESTION, **BRIEF))[-1][0],
    }
    for ids in (
        model.generate(**inputs, **BRIEF)[0],
        list(model.stream_generate(**inputs, **BRIEF))[-1][0],
    ):
        answers.add(model.process_response(tokenizer.decode(ids[inputs["input_ids"].shape[1] :])))
    answers = {answer.rstrip("\ufffd") for answer in answers}
    assert len(answers) == 1, answers
    return answers.pop()


def logits_of(model: Any, tokenizer: Any) -> torch.Tensor:
    # The kernels of a CPU round what packed weights are multiplied with.
    kernels_off = import_module("chatglm.model.environment_chatglm").kernels_off
    with torch.no_grad(), kernels_off():
        return model(**tokenizer(QUESTION, return_tensors="pt"), use_cache=False).logits.float()


@pytest.mark.parametrize(
    ("names", "bits"),
    [
        (["sft"], None),
        (["sft"], 4),
        (["sft", "ppo"], None),
        (["sft", "ppo"], 4),
        (["prefix"], 8),
        (["prefix/peft"], None),
        (["prefix/peft"], 4),
        (["prefix/checkpoint"], None),
    ],
)
def test_adapters_act_in_every_method(
    place: Path, tmp_path: Path, names: list[str], bits: int | None
) -> None:
    folders = [place / name for name in names]
    if names == ["prefix/checkpoint"]:
        folders = [make_official_checkpoint(place / "prefix", tmp_path / "checkpoint-3000")]
    stack = stack_adapters(folders, place / "base")
    loaded = load(stack, place / "base", bits)
    bare = load(None, place / "base", bits)
    answer = ask_all(loaded)
    assert answer != ask_all(bare)
    found, plain = logits_of(*loaded), logits_of(*bare)
    assert (found - plain).abs().max() > 0.1
    if "prefix" not in names[0] and bits is None:
        merge_checkpoint(place / "base", tmp_path / "merged", folders)
        wanted = load(None, tmp_path / "merged")
        torch.testing.assert_close(found, logits_of(*wanted), rtol=0, atol=0)
        assert ask_all(wanted) == answer


def make_official_checkpoint(prefix: Path, folder: Path) -> Path:
    """The folder as the official script left it: the encoder alone, and the trainer's leftovers."""
    folder.mkdir()
    for name in ("pytorch_model.bin", "config.json"):
        shutil.copy(prefix / name, folder)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_all_layouts_of_a_prefix_are_one(place: Path) -> None:
    """And what they do is what peft does with the one that is its own."""
    models = [
        load(stack_adapters([place / name], place / "base"), place / "base")
        for name in ("prefix", "prefix/peft")
    ]
    found = [logits_of(*loaded) for loaded in models]
    assert torch.equal(*found)
    base, tokenizer = load(None, place / "base")
    by_peft = PeftModel.from_pretrained(base, place / "prefix" / "peft").eval()
    torch.testing.assert_close(logits_of(by_peft, tokenizer), found[0], rtol=1e-4, atol=1e-4)


def test_a_chain_over_packed_weights_is_what_it_is_over_the_same_as_floats(place: Path) -> None:
    stack = stack_adapters([place / "sft", place / "ppo"], place / "base")
    packed, tokenizer = load(stack, place / "base", 8)
    bare, _ = load(None, place / "base", 8)
    found, plain = logits_of(packed, tokenizer), logits_of(bare, tokenizer)
    for _ in range(2):  # each of both acts
        packed.base_model.set_adapter(["default"])
        assert not torch.allclose(logits_of(packed, tokenizer), found, atol=0.01)
        packed.base_model.set_adapter(["1"])
        assert not torch.allclose(logits_of(packed, tokenizer), found, atol=0.01)
    floats = bare.dequantize()
    for folder in stack.folders:
        floats = PeftModel.from_pretrained(floats, folder).merge_and_unload()
    wanted = logits_of(floats, tokenizer)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (found - plain).abs().max() > 0.1


def chat(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *words: object) -> tuple[int, str, str]:
    ask(monkeypatch, QUESTION)
    options = ("--device", "cpu", "--dtype", "float32", "--greedy", "--max-new-tokens", "6")
    return run(capsys, "chat", *words, *options)


def test_the_command_takes_adapters(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    both = [place / "sft", place / "ppo"]
    wanted = load(stack_adapters(both, place / "base"), place / "base")
    answer = wanted[0].chat(wanted[1], QUESTION, **BRIEF)[0]
    code, out, told = chat(monkeypatch, capsys, place / "base", "--adapter", *both)
    assert (code, out, told) == (0, f"{answer}\n", "")
    code, out, told = chat(monkeypatch, capsys, "--adapter", both[0], "--adapter", both[1])
    assert (code, out) == (0, f"{answer}\n")
    assert told == f"chatglm: {both[0]} is for {place / 'base'}, which is taken"
    code, out, told = chat(monkeypatch, capsys, place / "base", "--adapter", place / "prefix")
    assert code == 0 and told == "" and out != f"{answer}\n"
    code, out, _ = chat(monkeypatch, capsys, place / "base", "--adapter", both[0], "--bits", 4)
    assert code == 0 and out


def test_a_wrong_base_is_refused_and_an_unknown_one_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    other = change_weights(Path(shutil.copytree(place / "base", tmp_path / "other")))
    for name in ("sft", "prefix", "prefix/peft"):
        code, _, told = chat(monkeypatch, capsys, other, "--adapter", place / name)
        assert code == 2 and "(digest " in told and "differs from that in" in told, name
        code, _, told = chat(monkeypatch, capsys, other, "--any-base", "--adapter", place / name)
        assert code == 0 and "taken all the same" in told, name
        copy = Path(shutil.copytree(place / name, tmp_path / name.replace("/", "-")))
        (copy / "origin.json").unlink()
        if name != "prefix":
            change_json(copy / "adapter_config.json", base_model_name_or_path="")
        code, _, told = chat(monkeypatch, capsys, other, "--adapter", copy)
        assert code == 0 and told.endswith("is not known"), name


def adapt(base: Path, folder: Path, config: Any) -> Path:
    model = AutoModel.from_pretrained(base, trust_remote_code=True)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_what_does_not_go_together_is_refused_by_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    task = {"task_type": "CAUSAL_LM"}
    virtual: dict[str, Any] = {**task, "num_virtual_tokens": 3}
    words = adapt(place / "base", tmp_path / "words", PromptTuningConfig(**virtual))
    biases = adapt(
        place / "base",
        tmp_path / "biases",
        LoraConfig(**task, bias="all", target_modules=["query_key_value"]),
    )
    small = adapt(place / "base", tmp_path / "small", PrefixTuningConfig(**virtual))
    base = place / "base"
    cases: list[tuple[list[object], str]] = [
        ([base, "--adapter", place / "sft", place / "prefix"], "a P-Tuning prefix, which does not"),
        ([base, "--adapter", words, place / "sft"], "kind PROMPT_TUNING, which does not go tog"),
        ([base, "--adapter", place / "prefix", small], "does not go together with a prefix of p"),
        ([base, "--adapter", place / "sft", place / "sft"], "is named twice: leave one out"),
        ([base, "--adapter", place / "ppo"], "with sft on top, and here it would stand on"),
        ([base, "--adapter", place / "ppo", place / "sft"], "in this order"),
        (
            [base, "--bits", 4, "--any-base", "--adapter", place / "sft", biases],
            "has biases or whole modules in the place of the model's, and beside packed",
        ),
        ([base, "--adapter", base], "is a model, which is named as such"),
        ([base, "--adapter", tmp_path], "is no model either: name a folder"),
        ([base, "--adapter", tmp_path / "none"], "is no folder"),
        (["--adapter", place / "sft" / "adapter_model.safetensors"], "but a weight file"),
    ]
    for command, message in cases:
        ask(monkeypatch, QUESTION)
        assert message in refuse(capsys, "chat", *command, "--device", "cpu"), command
    code, out, _ = chat(monkeypatch, capsys, base, "--adapter", words)
    assert code == 0 and out


def test_adapters_of_other_sizes_are_refused_before_peft_trips(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name, change in (
        ("sft", lambda t: t.repeat(2, 1)),
        ("prefix/peft", lambda t: t.repeat(1, 2)),
    ):
        copy = Path(shutil.copytree(place / name, tmp_path / name))
        file = copy / "adapter_model.safetensors"
        factors = {n: change(t) if "lora_A" not in n else t for n, t in load_file(file).items()}
        save_file(factors, file)
        ask(monkeypatch, QUESTION)
        told = refuse(capsys, "chat", place / "base", "--adapter", copy, "--device", "cpu")
        assert "of another model" in told, told


COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "chat": lambda folder, out: ["chat", "--model", folder],
    "train": lambda folder, out: ["train", "sft", "--model", folder, "--output", out],
    "quantize": lambda folder, out: ["quantize", folder, out, "--bits", 4],
    "bench": lambda folder, out: ["bench", folder],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["sft", "prefix", "prefix/peft"])
def test_an_adapter_as_model_is_named_with_the_command(
    place: Path,
    tmp_path: Path,
    command: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    ask(monkeypatch, QUESTION)
    words = COMMANDS[command](place / name, tmp_path / "out")
    if command == "train":
        words += ["--train_data", write_rows(tmp_path / "rows.jsonl", ROWS)]
    told = refuse(capsys, *words)
    kind = {"sft": "a LoRA adapter", "prefix": "a P-Tuning prefix"}.get(name, "a prefix of peft's")
    assert kind in told and "no model" in told
    assert f"`chatglm chat {place / 'base'} --adapter {place / name}`" in told


@pytest.mark.parametrize("name", ["sft", "prefix", "prefix/peft"])
def test_evaluation_takes_adapters(place: Path, tmp_path: Path, name: str, capsys: Capture) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    keys = ["--task", "perplexity", "--eval_data", data, "--device", "cpu", "--dtype", "float32"]

    def measure(output: str, *words: object) -> float:
        code, out, _ = run(capsys, "train", "eval", *keys, "--output", tmp_path / output, *words)
        assert code == 0
        return json.loads(out)["token_loss"]

    bare = measure("bare", "--model", place / "base")
    with_base = measure("one", "--model", place / "base", "--adapter", place / name)
    assert with_base != pytest.approx(bare, abs=1e-3)
    assert measure("two", "--adapter", place / name) == with_base
    told = refuse(
        capsys, "train", "eval", *keys, "--output", tmp_path / "x", "--adapter", place / "ppo"
    )
    assert "in this order" in told


def test_a_training_stands_on_all_that_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Nothing learned: what is written over what it stands on is what it stood on."""
    base, both = place / "base", [place / "sft", place / "ppo"]
    still: dict[str, Any] = {"learning_rate": 1e-12, "max_steps": 1, "save_steps": 1}
    capsys.readouterr()
    train_adapter(monkeypatch, base, tmp_path / "on", adapter=both, **still)
    told = capsys.readouterr().err
    assert f"{both[0]}: merged into the frozen base, and {both[1]} is trained on top" in told
    bases = read_origin(tmp_path / "on")["bases"]
    assert [a["name"] for a in bases[0]["adapters"]] == ["sft"]
    wanted = logits_of(*load(stack_adapters(both, base), base))
    found = logits_of(*load(stack_adapters([both[0], tmp_path / "on"], base), base))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    train_adapter(monkeypatch, base, tmp_path / "new", adapter=both, lora_rank=2, **still)
    marks = read_origin(tmp_path / "new")["bases"][0]["adapters"]
    assert [a["name"] for a in marks] == ["sft", "ppo"]
    three = [*both, tmp_path / "new" / "checkpoint-1"]
    found = logits_of(*load(stack_adapters(three, base), base))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert stored(tmp_path / "new").keys() and not (tmp_path / "new" / "model.safetensors").exists()


def test_a_training_without_model_takes_the_adapter_s_base(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train_adapter(monkeypatch, "", tmp_path / "on", adapter=place / "sft", max_steps=1)
    assert read_origin(out)["bases"] == read_origin(place / "sft")["bases"]


def test_what_a_training_cannot_stand_on_is_refused(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    other = change_weights(Path(shutil.copytree(place / "base", tmp_path / "other")))
    packed = tmp_path / "packed"
    quantize_checkpoint(place / "base", packed, PackedFormat(8))
    both = [place / "sft", place / "ppo"]
    base = ["--model", place / "base"]
    cases: list[tuple[list[object], str]] = [
        (["--model", other, "--adapter", both[0]], "differs from that in"),
        ([*base, "--adapter", both[1]], "in this order"),
        ([*base, "--adapter", place / "prefix"], "trained by the stage ptuning alone"),
        ([*base, "--adapter", *both, "--bits", 4], "would have to be merged into packed weights"),
        (
            [*base, "--adapter", both[0], "--lora_rank", 2, "--bits", 4],
            "merge first, chatglm merge",
        ),
        (["--model", packed, "--adapter", both[0], "--lora_rank", 2], "merge first, chatglm merge"),
    ]
    for number, (keys, message) in enumerate(cases):
        words = ["--train_data", data, "--output", tmp_path / f"out{number}", "--max_steps", 1]
        told = refuse(capsys, "train", "sft", *words, "--report_to", "none", *keys)
        assert message in told, keys


def test_the_auto_classes_refuse_an_adapter_whose_base_was_replaced(
    place: Path, tmp_path: Path
) -> None:
    """They put an adapter onto the base that it names."""
    base = Path(shutil.copytree(place / "base", tmp_path / "base"))
    adapter = Path(shutil.copytree(place / "sft", tmp_path / "sft"))
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    with package_code():
        model = AutoModel.from_pretrained(adapter, dtype=torch.float32).eval()
        wanted, tokenizer = load(stack_adapters([adapter], base), base)
        torch.testing.assert_close(
            logits_of(model, tokenizer), logits_of(wanted, tokenizer), rtol=1e-4, atol=1e-4
        )
        change_weights(base)
        with pytest.raises(ValueError, match=r"differs from that in attention\.query_key"):
            AutoModel.from_pretrained(adapter, dtype=torch.float32)
