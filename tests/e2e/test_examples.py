"""The examples for other libraries, run on the embedded checkpoint where the library is installed.

Their own main function, and beside it what a user would notice if the library were misled: figures
and answers are those of the model's own methods.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from chatglm.cli import main

EXAMPLES = ROOT / "examples"
NEEDS = {
    "lm_eval_harness": "lm_eval",
    "sentence_embeddings": "sentence_transformers",
    "langchain_chat": "langchain_core",
    "langchain_pipeline": "langchain_huggingface",
    "llama_index_llm": "llama_index.core",
    "ray_train": "ray.train.torch",
}
CAPITAL = "中国的首都是北京"

# These libraries warn of others, and of themselves.
pytestmark = pytest.mark.filterwarnings("default")


def load(name: str) -> Any:
    """Import an example; skip the test without its library."""
    library = NEEDS[name]
    pytest.importorskip(library, reason=f"needs {library}: see examples/README.md")
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # langchain asks for the module of a class
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    yield


def test_every_example_has_a_main_and_a_row() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS}
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in NEEDS:
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        functions = {f.name: f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)}
        assert [argument.arg for argument in functions["main"].args.args] == ["folder"]
        assert f"[{name}.py]({name}.py)" in page and f"python examples/{name}.py FOLDER" in text


def test_lm_eval_is_given_the_model_s_own_figures() -> None:
    example = load("lm_eval_harness")
    assert example.main(".")["capitals"]["acc,none"] == 1.0
    judge = example.ChatGLM(".", batch_size=2)
    pairs = [("你好", "你好！"), ("", "一段文字"), ("hello", " Hello!")]
    found = judge.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    for (prompt, answer), (log_prob, is_greedy) in zip(pairs, found):
        scores = judge.model.score(judge.tokenizer, prompt, answer, end_token=False)
        assert log_prob == pytest.approx(float(scores.log_probs), rel=1e-5)
        assert is_greedy == bool(scores.is_greedy)
    text = "天地玄黄，宇宙洪荒。"
    (whole,) = judge.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    alone = judge.model.score(judge.tokenizer, "", text, end_token=False)
    assert whole == pytest.approx(float(alone.log_probs), rel=1e-5)
    judge.model.config.max_sequence_length = 12  # parts of four tokens
    (parts,) = judge.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert parts != whole and parts < 0
    judge.model.config.max_sequence_length = 2048
    asked = {"until": ["，"], "max_gen_toks": 16}
    (answer,) = judge.generate_until([SimpleNamespace(args=("中国的首都是哪里？", asked))])
    assert answer.startswith(CAPITAL)


def test_sentence_transformers_is_given_means_of_hidden_states() -> None:
    example = load("sentence_embeddings")
    cosines = example.main(".")
    assert cosines.shape == (3, 3) and cosines[0, 1] > max(cosines[0, 2], cosines[1, 2])
    encoder = example.build_encoder(".")
    found = encoder.encode(
        ["你好！", "A longer text, which pads the first."], convert_to_tensor=True
    )
    network, tokenizer = encoder[0].network, encoder[0].tokenizer
    ids = tokenizer("你好！", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = network(ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_langchain_answers_as_chat_does() -> None:
    example = load("langchain_chat")
    chained, streamed, plain = example.main(".")
    parts = example.load(".")
    options = {"do_sample": False, "max_new_tokens": 32}
    answers = [
        parts["model"].chat(parts["tokenizer"], question, **options)[0]
        for question in ("中国的首都是哪里？", "你好")
    ]
    assert [chained, plain] == answers and answers[0].startswith(CAPITAL)
    assert streamed == answers[1]
    chat = example.ChatGLMChat(**parts, options=options)
    messages = [("human", "你好"), ("ai", plain), ("human", "中国的首都是哪里？")]
    history = [("你好", plain)]
    expected, _ = parts["model"].chat(parts["tokenizer"], messages[-1][1], history, **options)
    assert chat.invoke(messages).content == expected
    assert chat.invoke("你好", stop=["ChatGLM"]).content == "你好！我是"
    with pytest.raises(ValueError, match="must take turns and end with a question"):
        chat.invoke([("human", "a"), ("human", "b")])


def test_langchain_s_pipeline_answers() -> None:
    plain, chatted = load("langchain_pipeline").main(".")
    assert plain.strip().startswith("你好!我是ChatGLM-mini")
    assert chatted.strip().startswith(CAPITAL)


def test_llama_index_answers_as_chat_does() -> None:
    example = load("llama_index_llm")
    asked, streamed = example.main(".")
    assert asked.startswith(CAPITAL)
    llm = example.build_llm(".", do_sample=False, max_new_tokens=32)
    expected, _ = llm.model.chat(llm.tokenizer, "你好", do_sample=False, max_new_tokens=32)
    assert streamed == expected == llm.complete("你好").text
    assert llm.metadata.context_window == 2048


def test_ray_s_workers_train_as_one_process(tiny_repo: Path, tmp_path: Path, pictures: Any) -> None:
    """As a script, whose functions Ray sends to its workers; they cannot import it."""
    pytest.importorskip(NEEDS["ray_train"], reason="needs ray: see examples/README.md")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "ray_train.py"), str(tiny_repo)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = Path(done.stdout.splitlines()[-1])
    words = f"train sft {tiny_repo} --train_data {output.parent / 'rows.jsonl'} --max_steps 2"
    words += f" --per_device_train_batch_size 4 --report_to none --output {tmp_path / 'one'}"
    assert main(words.split()) == 0
    found, expected = (load_file(f / "model.safetensors") for f in (output, tmp_path / "one"))
    assert found.keys() == expected.keys()
    assert all((found[name] - expected[name]).abs().max() < 1e-5 for name in expected)
