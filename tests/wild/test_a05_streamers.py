"""The streamers of transformers: what they show is what `decode` gives, character by character.

A streamer decodes its tokens again with each new one and shows what is longer. Cleaning up takes
spaces back, a line break makes it forget its tokens, and half a character is another one later.
"""

import asyncio
import json
from functools import cache
from itertools import pairwise, product
from threading import Thread
from typing import Any

import pytest
import torch
from chatglm_6b.environment_chatglm import find_settled
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import REPO_SIZES, ROOT, build_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer

LATE = ChatGLMTokenizer(str(ROOT / "ice_text.model"), num_image_tokens=0)
FIRST = ChatGLMTokenizer(str(ROOT / "ice_text.model"), num_image_tokens=9)
both = pytest.mark.parametrize("tokenizer", [LATE, FIRST], ids=["late", "first"])

TEXTS = [
    "Bonjour ! Ça va ?",
    "a\n b",
    "a\n\n  b\n",
    " \n \n",
    "do n't , I 'm 'll it 's ' fine ' . . .",
    "a ' . b ' ",
    "龘龘 👋 , 龘",
    "1 . 2 ? 3 ! n",
    "你好 ！ 你 ' 好 '",
    "tab\t , end ' ",
]
SIGNS = [" ", "'", ".", "?", "!", ",", "n", "t", "m", "s", "v", "e", "r", "x", "\n", "你"]
SIGNS += [" '", " n", " n't", " 's", " ' ", "  ", "\n ", "👋", "\t"]

quick = settings(deadline=None, max_examples=80)
either = st.sampled_from([LATE, FIRST])
texts = st.lists(st.sampled_from(SIGNS) | st.text(max_size=3), max_size=25).map("".join)
options = st.fixed_dictionaries(
    {},
    optional={
        "skip_special_tokens": st.booleans(),
        "clean_up_tokenization_spaces": st.booleans(),
    },
)


class Collector(TextStreamer):
    """What a streamer shows, bit by bit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shown: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.shown.append(text)


def stream(tokenizer: Any, ids: list[int], prompt: int = 0, **kwargs: Any) -> str:
    """Feed a streamer as `generate` does: the prompt at once, then token by token."""
    streamer = Collector(tokenizer, **kwargs)
    streamer.put(torch.tensor([ids[:prompt]]))
    for index in ids[prompt:]:
        streamer.put(torch.tensor([index]))
    streamer.end()
    return "".join(streamer.shown)


@both
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cleans_up", [None, True, False])
def test_texts(tokenizer: ChatGLMTokenizer, text: str, cleans_up: bool | None) -> None:
    kwargs = {} if cleans_up is None else {"clean_up_tokenization_spaces": cleans_up}
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert stream(tokenizer, ids, **kwargs) == tokenizer.decode(ids, **kwargs)


@quick
@given(either, texts, st.integers(0, 9), options)
@example(LATE, "a ' .", 0, {})
@example(LATE, "a '  .b", 0, {})
@example(LATE, "  ' m", 0, {})
def test_any_text(tokenizer: ChatGLMTokenizer, text: str, prompt: int, kwargs: Any) -> None:
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert stream(tokenizer, ids, prompt, **kwargs) == tokenizer.decode(ids, **kwargs)


@quick
@given(
    either,
    st.lists(st.integers(-3, LATE.vocab_size + 20) | st.integers(7900, 8300), max_size=40),
    st.integers(0, 9),
    options,
)
def test_any_ids(tokenizer: ChatGLMTokenizer, ids: list[int], prompt: int, kwargs: Any) -> None:
    """Bytes of broken characters, control tokens, image ids and numbers that are no token."""
    assert stream(tokenizer, ids, prompt, **kwargs) == tokenizer.decode(ids, **kwargs)


@quick
@given(texts, texts)
def test_what_is_settled_stays(text: str, more: str) -> None:
    settled, cleaned = find_settled(text, True), LATE.clean_up_tokenization(text)
    assert cleaned.startswith(settled)
    assert len(cleaned[len(settled) :].lstrip("\n\ufffd")) <= 6
    assert LATE.clean_up_tokenization(text + more).startswith(settled)
    assert find_settled(text + more, True).startswith(settled)


@pytest.mark.parametrize("letters", [" '.ntmx", " 'vres\n"])
def test_what_is_settled_of_every_short_text_stays(letters: str) -> None:
    """Marks make marks: of two spaces, " ' " leaves one, and with the "m" behind it " 'm"."""
    settle = cache(find_settled)
    for text in map("".join, product(letters, repeat=5)):
        settled = [settle(text[:end], True) for end in range(6)]
        cleaned = LATE.clean_up_tokenization(text)
        assert all(map(cleaned.startswith, settled)), (text, settled)
        assert all(later.startswith(shown) for shown, later in pairwise(settled)), (text, settled)


@both
def test_a_stream_does_not_wait_for_the_end(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer("你好，我很好，谢谢你的好意。\n你好", add_special_tokens=False)["input_ids"]
    streamer = Collector(tokenizer)
    for index in ids[:-1]:
        streamer.put(torch.tensor([index]))
    shown = "".join(streamer.shown)
    assert len(shown) >= len(tokenizer.decode(ids[:-1])) - 4
    assert len([text for text in streamer.shown if text]) > 3


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny model that writes any token of the vocabulary, bytes and white space often."""
    fields = json.loads((ROOT / "config.json").read_text()) | REPO_SIZES
    model = build_model(**{key: value for key, value in fields.items() if key != "torch_dtype"})
    bias = torch.zeros(model.config.vocab_size)
    bias[-344:] = 2
    model.lm_head.register_forward_hook(lambda module, inputs, output: output / 8 + bias)
    return model


def write(model: Any, streamer: Any, seed: int) -> tuple[int, list[int]]:
    """Let a model write 40 tokens: the length of the prompt, and the ids of prompt and answer."""
    inputs = LATE("a ' b", return_tensors="pt")
    torch.manual_seed(seed)
    ids = model.generate(
        **inputs, streamer=streamer, do_sample=True, min_new_tokens=40, max_new_tokens=40
    )
    return inputs["input_ids"].shape[1], ids[0].tolist()


def read(streamer: TextIteratorStreamer) -> str:
    return "".join(streamer)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("skip_prompt", [True, False])
def test_streamers_of_generate(
    model: Any, seed: int, skip_prompt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, ids = write(model, TextStreamer(LATE, skip_prompt=skip_prompt), seed)
    right = LATE.decode(ids[prompt:] if skip_prompt else ids)
    assert capsys.readouterr().out == right + "\n"
    streamer = TextIteratorStreamer(LATE, skip_prompt=skip_prompt, timeout=60)
    thread = Thread(target=write, args=(model, streamer, seed))
    thread.start()
    assert read(streamer) == right
    thread.join()


@pytest.mark.parametrize("seed", range(2))
def test_an_asynchronous_streamer(model: Any, seed: int) -> None:
    async def collect() -> str:
        streamer = AsyncTextIteratorStreamer(LATE, skip_prompt=True, timeout=60)
        thread = Thread(target=write, args=(model, streamer, seed))
        thread.start()
        shown = [text async for text in streamer]
        thread.join()
        return "".join(shown)

    prompt, ids = write(model, None, seed)
    assert asyncio.run(collect()) == LATE.decode(ids[prompt:])
