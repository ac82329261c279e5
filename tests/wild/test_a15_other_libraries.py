"""A15: pipelines take the model without a word of "not supported", by both doors and as objects.

sentence-transformers refuses a folder by itself; tests/e2e/test_examples.py has what works there.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import import_from_package
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

SHORT = {"max_new_tokens": 4, "do_sample": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags are not valid")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers' own log is given, which does not reach the root's."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, log = Keep(), logging.getLogger("transformers")
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


@pytest.mark.parametrize("way", ["path", "objects"])
@pytest.mark.parametrize("door", ["hub", "package"])
def test_a_pipeline_takes_the_model_without_a_word(
    door: str, way: str, tiny_repo: Path, said: list[str]
) -> None:
    is_package = door == "package"
    package_code = import_from_package("chatglm.door").package_code if is_package else None
    trust = {} if is_package else {"trust_remote_code": True}
    with package_code() if package_code is not None else contextlib.nullcontext():
        tokenizer = AutoTokenizer.from_pretrained(tiny_repo, **trust)
        model = AutoModelForCausalLM.from_pretrained(tiny_repo, **trust).eval()
        given: dict[str, Any] = {"model": str(tiny_repo), **trust}
        if way == "objects":
            given = {"model": model, "tokenizer": tokenizer}
        write = pipeline("text-generation", device="cpu", return_full_text=False, **given)
        (answer,) = write("hello", **SHORT)
    assert not [line for line in said if "not supported" in line]
    prompt = tokenizer("hello", return_tensors="pt")
    ids = model.generate(**prompt, **SHORT)[0, prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert answer["generated_text"].strip() == text.strip()


def test_hidden_states_are_the_base_model_s(tiny_repo: Path) -> None:
    """`AutoModel` is the model that writes, as in the official folders: its output is logits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True).eval()
    ids = torch.tensor([[5, 197, 86, 97]])
    with torch.no_grad():
        states = model.base_model(ids).last_hidden_state
        output = model(ids, output_hidden_states=True)
    assert states.shape == (1, 4, model.config.hidden_size)
    assert torch.equal(output.hidden_states[-1], states)
    assert output.logits.shape == (1, 4, model.config.vocab_size)
