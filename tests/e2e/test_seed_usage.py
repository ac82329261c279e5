"""The usage code that people have had for these checkpoints since 2023, without `.cuda()`.

The model is a tiny random one, so that what it says means nothing: every chain must run, and give
the numbers that a cast may give.
"""

import builtins
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoTokenizer

import chatglm
from chatglm import door

# peft says the old names of checkpointing, for which transformers 5.23 has new ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

SENTENCES = ["新冠肺炎怎么预防。\n答："]


# How Python prints a pair that begins with a text: an answer may have an apostrophe in it.
PRINTED = ("('", '("')


@pytest.fixture(scope="module")
def adapter(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as they were published: adapter_config.json and a pickled adapter_model.bin."""
    folder = tmp_path_factory.mktemp("chatglm_lora")
    model = get_peft_model(load(tiny_repo), LoraConfig(r=4, lora_alpha=32))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, safe_serialization=False)
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def chat_as_written(model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    for s in SENTENCES:
        response = model.chat(tokenizer, s, max_length=128, eos_token_id=tokenizer.eos_token_id)
        print(response)  # noqa: T201
    answer, history = response
    assert history == [(SENTENCES[0], answer)]
    return capsys.readouterr().out


def test_a_lora_on_the_official_model(
    tiny_repo: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Written without trust_remote_code: transformers then asks, and the user says yes."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda text="": asked.append(text) or "y")
    model = AutoModel.from_pretrained(str(tiny_repo), device_map="auto")
    assert any("custom code" in text for text in asked)
    model = PeftModel.from_pretrained(model, str(adapter))
    model = model.half()
    assert model.dtype == torch.float16
    tokenizer = load_tokenizer(tiny_repo)
    assert chat_as_written(model, tokenizer, capsys).startswith(PRINTED)
    ids = tokenizer(SENTENCES, return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        plain = model(ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain, atol=1e-2)


def read_blocks() -> list[str]:
    """The Python of the second seed's page, if it is here; one parameter, if not."""
    pages = [page.read_text(encoding="utf-8") for page in SHARED.glob("seeds/*.txt")]
    pages = [page for page in pages if "chatglm-fitness-RLHF" in page]
    return re.findall(r"^```python\n(.*?)^```$", "".join(pages), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", [0, 1])
def test_the_fork_s_own_page_runs_as_written(
    number: int,
    tiny_repo: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With no trust for the model, some for the tokenizer, and a folder whose Python is dead."""
    blocks = read_blocks()
    if not blocks:
        pytest.skip(f"needs the fork's page in {SHARED / 'seeds'}")
    for name in ("THUDM/chatglm-6b", "fb700/chatglm-fitness-RLHF"):
        folder = shutil.copytree(tiny_repo, tmp_path / name)
        for file in folder.glob("*.py"):
            file.write_text("import icetk\n")
    shutil.copytree(adapter, tmp_path / "model" / "chatglm_fitness_lora")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, *args: self)
    monkeypatch.setattr(door, "_is_registered", False)
    chatglm.register()
    names: dict[str, Any] = {}
    exec(compile(blocks[number], f"block {number}", "exec"), names)
    assert capsys.readouterr().out.startswith(PRINTED)
    model = names["model"]
    core = model.get_base_model() if number == 0 else model
    assert type(core).__module__ == "chatglm.model.modeling_chatglm"
    assert model.config.quantization_bit == (0 if number == 0 else 4)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_half_and_quantized(
    tiny_repo: Path, bits: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny_repo, device_map="auto")
    model = model.half() if bits is None else model.half().quantize(bits)
    weight = model.transformer.layers[0].mlp.dense_h_to_4h.weight
    assert weight.dtype == (torch.float16 if bits is None else torch.int8)
    assert model.lm_head.weight.dtype == torch.float16
    assert chat_as_written(model, load_tokenizer(tiny_repo), capsys).startswith(PRINTED)


# Each chain, and how far it may take the logits from float32's, relative to the largest.
CHAINS = {
    "half": (lambda model: model.half(), 0.003),
    "float": (lambda model: model.float(), 0.0),
    "half, float": (lambda model: model.half().float(), 0.003),
    "bfloat16": (lambda model: model.bfloat16(), 0.02),
    "to": (lambda model: model.half().to("cpu"), 0.003),
    "quantize(0)": (lambda model: model.half().quantize(0), 0.003),
    "quantize(8), half": (lambda model: model.quantize(8).half(), 0.02),
    "quantize(4), float": (lambda model: model.half().quantize(4).float(), 0.25),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_of_casts(tiny_repo: Path, chain: str) -> None:
    cast, tolerance = CHAINS[chain]
    model, plain, tokenizer = (
        cast(load(tiny_repo)).eval(),
        load(tiny_repo),
        load_tokenizer(tiny_repo),
    )
    ids = tokenizer(SENTENCES, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = plain(ids).logits
        difference = (model(ids).logits.float() - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance
    assert bool(difference > 0) is (tolerance > 0)
    response, history = model.chat(tokenizer, "你好", history=[], max_length=24)
    response, history = model.chat(tokenizer, "晚上睡不着怎么办", history=history, max_new_tokens=4)
    assert [question for question, _ in history] == ["你好", "晚上睡不着怎么办"]
    assert history[-1][1] == response


def test_a_trained_prefix(tiny_repo: Path, tmp_path: Path) -> None:
    """As the official fine-tuning guide loads a P-Tuning checkpoint of the prefix alone."""
    trained = load(tiny_repo, pre_seq_len=128)
    torch.save(trained.state_dict(), tmp_path / "pytorch_model.bin")

    tokenizer = load_tokenizer(tiny_repo)
    config = AutoConfig.from_pretrained(tiny_repo, pre_seq_len=128, trust_remote_code=True)
    model = AutoModel.from_pretrained(tiny_repo, config=config, trust_remote_code=True)
    state = torch.load(tmp_path / "pytorch_model.bin")
    prefix = "transformer.prefix_encoder."
    states = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    model.transformer.prefix_encoder.load_state_dict(states)
    ids = tokenizer(SENTENCES, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trained(ids).logits)
        assert not torch.allclose(model(ids).logits, load(tiny_repo)(ids).logits, atol=1e-3)
    model = model.quantize(4)
    model = model.half()
    model.transformer.prefix_encoder.float()
    model = model.eval()
    response, history = model.chat(tokenizer, "你好", history=[], max_length=24)
    assert history == [("你好", response)]


def test_streaming(tiny_repo: Path) -> None:
    tokenizer = load_tokenizer(tiny_repo)
    model = load(tiny_repo).float().eval()
    history: list[tuple[str, str]] = []
    short = {"max_new_tokens": 6}
    for query in ("你好", "晚上睡不着应该怎么办"):
        stream = model.stream_chat(tokenizer, query, history=history, **short)
        for response, history in stream:
            assert history[-1] == (query, response)
    assert len(history) == 2


def test_batches_from_the_tokenizer(tiny_repo: Path) -> None:
    """What the official repository's own tests do: a padded batch straight into generate."""
    tokenizer, model = load_tokenizer(tiny_repo), load(tiny_repo)
    texts = ["你好", "介绍一下清华大学"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    outputs = model.generate(**inputs, do_sample=False, max_length=32)
    for text, row in zip(texts, outputs):
        alone = tokenizer([text], return_tensors="pt")
        length = alone["input_ids"].shape[1]
        new = 32 - inputs["input_ids"].shape[1]
        expected = model.generate(**alone, do_sample=False, max_length=length + new)[0, length:]
        answer = row[inputs["input_ids"].shape[1] :][: len(expected)]
        assert answer.tolist() == expected.tolist()
        assert isinstance(tokenizer.decode(row.tolist()), str)
    legacy = tokenizer.build_legacy_inputs(inputs)
    assert torch.equal(model.generate(**legacy, do_sample=False, max_length=32), outputs)
    beams = model.generate(**inputs, do_sample=False, num_beams=4, max_length=32)
    assert torch.equal(model.generate(**legacy, do_sample=False, num_beams=4, max_length=32), beams)
