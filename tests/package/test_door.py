"""The package door: Auto classes, without trust, on folders whose own code must never run."""

import builtins
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SHARED, build_model
from model_folders import THIN, change_json, make_adapter, make_official, read_json
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)

import chatglm
from chatglm import door

GENERATORS = (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM)
DEAD = 'raise RuntimeError("the folder\'s code ran")\n'
DEAD_FILES = ("configuration_chatglm.py", "modeling_chatglm.py", "quantization.py")
DEAD_FILES += ("tokenization_chatglm.py",)
OLD_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
}
OLD_TOKENIZER = {
    "name_or_path": "THUDM/chatglm-6b",
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
FIRST, LATE = 150528, 130528
VOCABULARIES = {LATE: "ice_text.v1.1.model", FIRST: "ice_text.v0.model"}
trusts = pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["", "trust"])
# peft asks transformers 5.23 by an old name.
old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Open the door for one test; nobody may be asked whether code is trusted."""

    def refuse(text: str = "") -> str:
        raise AssertionError(text)

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr(door, "_is_registered", False)
    before = {name for name in sys.modules if name.startswith("transformers_modules.")}
    chatglm.register()
    yield
    assert before >= {name for name in sys.modules if name.startswith("transformers_modules.")}


def make_old(folder: Path, vocab_size: int = LATE, **fields: Any) -> Path:
    """A folder of 2023 as it was downloaded, with code that fails when it is imported."""
    make_official(folder, vocab_size, model_type="chatglm", **fields)
    change_json(folder / "config.json", auto_map=OLD_MAP, torch_dtype="float16")
    (folder / "tokenizer_config.json").write_text(json.dumps(OLD_TOKENIZER))
    for name in DEAD_FILES:
        (folder / name).write_text(DEAD)
    return folder


def make_quantized(folder: Path, bits: int, embeddings: bool) -> Path:
    """A folder as `-int4`, `-int4-qe` and `-int8` were published: one archive of packed weights."""
    make_old(folder)
    packing = {"quantization_bit": bits, "quantization_embeddings": embeddings}
    change_json(folder / "config.json", **packing)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    model = build_model(**THIN, vocab_size=LATE).half()
    model.quantize(bits, embeddings=embeddings)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def logits(model: Any) -> torch.Tensor:
    offset = 20000 if model.config.vocab_size == FIRST else 0
    ids = torch.tensor([[5, 9, model.config.gmask_token_id - offset, 0]]) + offset
    ids[0, -1] = model.config.bos_token_id
    with torch.no_grad():
        return model.eval().float()(ids).logits


@trusts
@pytest.mark.parametrize("auto_class", GENERATORS, ids=lambda c: c.__name__)
def test_every_auto_class_takes_the_installed_code(
    tmp_path: Path, auto_class: Any, trust: dict[str, bool]
) -> None:
    folder = make_old(tmp_path / "old")
    model, report = auto_class.from_pretrained(folder, output_loading_info=True, **trust)
    assert type(model).__module__ == "chatglm.model.modeling_chatglm"
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(AutoConfig.from_pretrained(folder, **trust)) is type(model.config)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    assert type(tokenizer).__module__ == "chatglm.model.tokenization_chatglm"
    expected = build_model(**THIN, vocab_size=LATE, **ids_of(LATE)).half()
    assert torch.equal(logits(model), logits(expected))


def ids_of(vocab_size: int) -> dict[str, int]:
    preset = "chatglm-6b" if vocab_size == LATE else "chatglm-6b-v0"
    fields = read_json(ROOT / "chatglm" / "presets" / preset / "config.json")
    return {name: fields[name] for name in fields if name.endswith("_token_id")}


@trusts
def test_a_classifier(tmp_path: Path, trust: dict[str, bool]) -> None:
    folder = make_old(tmp_path / "old")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **trust)
    assert (type(model).__module__, model.config.num_labels) == (
        "chatglm.model.modeling_chatglm",
        3,
    )
    model.save_pretrained(tmp_path / "new")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    assert torch.equal(again.score.weight, model.score.weight)
    assert read_json(tmp_path / "new" / "config.json")["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_what_an_old_folder_lacks_is_completed(tmp_path: Path, vocab_size: int) -> None:
    folder = make_old(tmp_path / "old", vocab_size)
    offset = 20000 if vocab_size == FIRST else 0
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for name, token_id in ids_of(vocab_size).items():  # its own pad_token_id is 0
        assert getattr(model.config, name) == token_id
    settings = model.generation_config
    assert settings.eos_token_id == [offset + 130005, offset + 2]
    assert (settings.pad_token_id, settings.bos_token_id) == (offset + 3, offset + 130004)
    assert (settings.do_sample, settings.top_p, settings.temperature) == (True, 0.7, 0.95)
    assert tokenizer.num_image_tokens == offset
    assert tokenizer.padding_side == ("right" if offset else "left")
    assert tokenizer.eos_token == ("</s>" if offset else "<eop>")
    assert tokenizer.chat_template == (ROOT / "chat_template.jinja").read_text()


def test_what_a_folder_says_itself_stays(tmp_path: Path) -> None:
    folder = make_old(tmp_path / "old", layernorm_epsilon=0.25)
    own = OLD_TOKENIZER | {"padding_side": "right", "chat_template": "{{ 1 }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "generation_config.json").write_text('{"max_new_tokens": 5}')
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.layernorm_epsilon == 0.25
    assert (tokenizer.padding_side, tokenizer.chat_template) == ("right", "{{ 1 }}")
    settings = model.generation_config
    assert settings.max_new_tokens == 5 and not settings.do_sample
    assert settings.eos_token_id == [130005, 2]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", num_image_tokens=7)
    assert (tokenizer.padding_side, tokenizer.num_image_tokens) == ("left", 7)


def test_ids_that_this_project_wrote_stay(tmp_path: Path) -> None:
    folder = make_old(tmp_path / "old")
    assert AutoConfig.from_pretrained(folder).pad_token_id == 3  # it says 0, as many did
    change_json(folder / "config.json", auto_map=chatglm_map(), pad_token_id=7)
    assert AutoConfig.from_pretrained(folder).pad_token_id == 7
    assert AutoConfig.from_pretrained(folder).gmask_token_id == 130001


def test_defaults_that_nobody_chose_are_completed(tmp_path: Path) -> None:
    """As fine-tunes of the time have them: written by transformers from the configuration."""
    folder = make_old(tmp_path / "old")
    derived = {"_from_model_config": True, "eos_token_id": 130005, "transformers_version": "4.27.1"}
    (folder / "generation_config.json").write_text(json.dumps(derived))
    settings = AutoModel.from_pretrained(folder).generation_config
    assert (settings.eos_token_id, settings.do_sample) == ([130005, 2], True)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_an_old_folder_chats(tmp_path: Path, vocab_size: int) -> None:
    """With the vocabulary that belongs to it; the pieces that the first one lacks are completed."""
    vocabulary = SHARED / "tokenizers" / VOCABULARIES[vocab_size]
    if not vocabulary.is_file():
        pytest.skip(f"needs {vocabulary}, which may not be published")
    folder = make_old(tmp_path / "old", vocab_size)
    shutil.copy(vocabulary, folder / "ice_text.model")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for name in ("bos", "mask", "gmask", "pad"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(model.config, f"{name}_token_id")
    _, history = model.float().chat(tokenizer, "你好", history=[], max_new_tokens=3)
    assert history[0][0] == "你好"
    messages = [{"role": "user", "content": "你好"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"] == tokenizer("你好")["input_ids"]


@pytest.mark.parametrize(("bits", "embeddings"), [(4, False), (4, True), (8, False)])
def test_quantized_folders(tmp_path: Path, bits: int, embeddings: bool) -> None:
    folder = make_quantized(tmp_path / "old", bits, embeddings)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.quantization_bit == bits
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state = model.state_dict()
    assert (state["transformer.word_embeddings.weight"].dtype == torch.int8) is embeddings
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_quantizing_while_loading_and_options_of_the_configuration(tmp_path: Path) -> None:
    folder = make_old(tmp_path / "old")
    packing = {"quant_method": "chatglm", "bits": 8}
    model = AutoModel.from_pretrained(folder, quantization_config=packing, dtype=torch.float16)
    assert model.transformer.layers[0].mlp.dense_4h_to_h.weight.dtype == torch.int8
    model = AutoModel.from_pretrained(folder, pre_seq_len=4, dtype="auto")
    assert model.transformer.prefix_encoder.embedding.weight.shape[0] == 4
    config, unused = AutoConfig.from_pretrained(
        folder, pre_seq_len=4, strange=1, return_unused_kwargs=True
    )
    assert (config.pre_seq_len, unused["strange"]) == (4, 1)
    assert AutoModel.from_pretrained(folder, config=config).config.pre_seq_len == 4


@trusts
def test_a_model_without_weights(tmp_path: Path, trust: dict[str, bool]) -> None:
    folder = make_old(tmp_path / "old")
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, **trust)
    assert type(model).__module__ == "chatglm.model.modeling_chatglm"
    assert model.generation_config.eos_token_id == [130005, 2]


def test_a_saved_folder_goes_through_both_doors(tiny_repo: Path, tmp_path: Path) -> None:
    folder = tmp_path / tmp_path.name
    model = AutoModel.from_pretrained(tiny_repo)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_repo).save_pretrained(folder)
    assert {path.name for path in tiny_repo.glob("*.py")} == {p.name for p in folder.glob("*.py")}
    assert read_json(folder / "config.json")["auto_map"] == chatglm_map()
    assert torch.equal(logits(AutoModel.from_pretrained(folder)), logits(model))
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__module__, type(tokenizer).__module__)\n"
        "print(model.chat(tokenizer, 'hi', do_sample=False, max_new_tokens=4)[0])\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    classes, answer = done.stdout.split("\n", 1)
    assert classes.count("transformers_modules.") == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert answer.strip() == model.chat(tokenizer, "hi", do_sample=False, max_new_tokens=4)[0]


def chatglm_map() -> dict[str, str]:
    return read_json(ROOT / "config.json")["auto_map"]


@old_name
def test_an_adapter_loads_onto_its_model(tiny_repo: Path, tmp_path: Path) -> None:
    with door.folder_code():  # the way the adapter was made is of no matter
        base = shutil.copytree(tiny_repo, tmp_path / "base")
    for name in DEAD_FILES:
        (base / name).write_text(DEAD)
    make_adapter(base, tmp_path / "adapter", task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(model).__module__ == "chatglm.model.modeling_chatglm"
    layer = model.transformer.layers[0].attention.query_key_value
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(torch.equal(layer.lora_A["default"].weight, tensor) for tensor in stored.values())


def test_a_tokenizer_alone(tiny_repo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(tiny_repo).save_pretrained(folder)
    (folder / "tokenization_chatglm.py").write_text(DEAD)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__module__ == "chatglm.model.tokenization_chatglm"
    assert tokenizer("hi") == AutoTokenizer.from_pretrained(tiny_repo)("hi")


def test_a_pipeline(tiny_repo: Path) -> None:
    generator = pipeline("text-generation", str(tiny_repo))
    assert type(generator.model).__module__ == "chatglm.model.modeling_chatglm"
    assert type(generator.tokenizer).__module__ == "chatglm.model.tokenization_chatglm"


# What is not of the family


LATER = {
    "ChatGLM2": {"padded_vocab_size": 65024},
    "GLM-4": {"padded_vocab_size": 151552},
}


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoTokenizer, *GENERATORS])
@pytest.mark.parametrize("name", LATER)
def test_later_models_are_named(tmp_path: Path, name: str, auto_class: Any) -> None:
    fields = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "auto_map": OLD_MAP}
    fields |= {"kv_channels": 128, **LATER[name]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(OLD_TOKENIZER))
    with pytest.raises(ValueError, match=rf"{tmp_path.name} is a {name}.*trust_remote_code=True"):
        auto_class.from_pretrained(tmp_path)


def test_a_later_model_runs_its_own_code_when_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"model_type": "chatglm", "auto_map": OLD_MAP, "kv_channels": 128}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "configuration_chatglm.py").write_text(DEAD)
    with pytest.raises(RuntimeError, match="the folder's code ran"):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    for name in [name for name in sys.modules if f".{tmp_path.name}" in name]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoTokenizer, AutoModel])
def test_an_empty_folder_is_named(tmp_path: Path, auto_class: Any) -> None:
    for error in (ValueError, OSError):
        with pytest.raises(error, match=f"{tmp_path.name} is an empty folder: download a model"):
            auto_class.from_pretrained(tmp_path)


def test_other_models_load_as_ever(tmp_path: Path) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, **ids)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is GPT2LMHeadModel
    assert not model.generation_config.do_sample
    assert type(AutoModelForCausalLM.from_config(config)) is GPT2LMHeadModel


# The door itself


def test_the_folder_s_own_code_runs_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_old(tmp_path / "own")
    with chatglm.folder_code():
        for auto_class in (AutoConfig, AutoTokenizer):
            with pytest.raises(RuntimeError, match="the folder's code ran"):
                auto_class.from_pretrained(folder, trust_remote_code=True)
        with door.package_code():
            assert AutoConfig.from_pretrained(folder).vocab_size == LATE
    assert AutoConfig.from_pretrained(folder).vocab_size == LATE
    for name in [name for name in sys.modules if name.startswith("transformers_modules.own")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_closed_door_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_old(tmp_path / "old")
    monkeypatch.setattr(door, "_is_registered", False)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


BEFORE = "import chatglm\nchatglm.register(); chatglm.register()\n"
AFTER = "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
SHOW = (
    "import sys\n"
    "print(type(AutoConfig.from_pretrained(sys.argv[1])).__module__)\n"
    "print('torch' in sys.modules)\n"
    "print(type(AutoTokenizer.from_pretrained(sys.argv[1])).__module__)\n"
    "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)\n"
    "print([f for f in sys.meta_path if type(f).__module__ == 'chatglm.door'].__len__())\n"
)


@pytest.mark.parametrize("code", [BEFORE + AFTER, AFTER + BEFORE], ids=["before", "after"])
def test_it_may_be_opened_before_and_after_transformers(tmp_path: Path, code: str) -> None:
    lines = run_python(code + SHOW, str(make_old(tmp_path / "old"))).split()
    assert [line for line in lines if line not in ("True", "False")] == [
        "chatglm.model.configuration_chatglm",
        "chatglm.model.tokenization_chatglm",
        "chatglm.model.modeling_chatglm",
        "1",
    ]


def test_opening_it_is_cheap() -> None:
    """Best of three, because the machine may be busy."""
    code = (
        "import sys, time\nstart = time.perf_counter()\nimport chatglm\nchatglm.register()\n"
        "print(time.perf_counter() - start)\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
    )
    assert min(float(run_python(code)) for _ in range(3)) < 0.1


def test_threads_may_open_it_while_transformers_is_imported(tmp_path: Path) -> None:
    code = (
        "import importlib, sys, threading\nimport chatglm\n"
        "names = ['configuration', 'tokenization', 'modeling']\n"
        "steps = [lambda n=n: importlib.import_module(f'transformers.models.auto.{n}_auto') "
        "for n in names]\n"
        "threads = [threading.Thread(target=t) for t in [*steps, *[chatglm.register] * 4]]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
    )
    lines = run_python(code + AFTER + SHOW, str(make_old(tmp_path / "old"))).split()
    assert lines[-1] == "1" and lines[-2] == "chatglm.model.modeling_chatglm"


def test_a_door_opened_for_a_while_is_open_in_one_thread_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_is_registered", False)
    seen: list[bool] = []
    with door.package_code():
        thread = threading.Thread(target=lambda: seen.append(door.is_open()))
        thread.start()
        thread.join()
        assert door.is_open()
    assert (seen, door.is_open()) == ([False], False)


def test_methods_are_wrapped_once() -> None:
    before: Callable[..., Any] = AutoModel.from_pretrained.__func__
    for _ in range(2):
        door._prepare(sys.modules["transformers.models.auto.modeling_auto"])
    assert AutoModel.from_pretrained.__func__ is before
    assert not hasattr(before.__wrapped__, "chatglm_wrapped")
