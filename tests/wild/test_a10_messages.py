"""Messages in every shape that people hand over: what they mean is rendered, or refused by name.

The template is asked twice: by our tokenizer, and by jinja alone as servers do that do not run it.
"""

import copy
import dataclasses
import enum
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import jinja2
import pytest
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
TOKENIZER = ChatGLMTokenizer(
    str(ROOT / "ice_text.model"), num_image_tokens=0, chat_template=TEMPLATE
)


def text(content: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": content}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def render_elsewhere(messages: Any, **options: Any) -> str:
    """Render with jinja alone, which knows no mark for the part that an assistant generates."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    plain = TEMPLATE.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    return environment.from_string(plain).render(messages=messages, **options)


@dataclasses.dataclass
class Message:
    role: str
    content: Any
    name: str | None = None
    tool_calls: Any = None


class Role(str, enum.Enum):
    USER = "user"


class Chat(NamedTuple):
    messages: list[Any]


RENDERED = {
    "a part": ([user([text("hi")])], "hi"),
    "parts": ([user([text("a"), text("b ", "input_text"), text("c")])], "ab c"),
    "a part that is a string": ([user(["a", text("b")])], "ab"),
    "a part without type": ([user([{"text": "a"}, {"type": None, "text": "b"}])], "ab"),
    "more in a part": ([user([text("a") | {"cache_control": {"type": "ephemeral"}}])], "a"),
    "an empty part": ([user([text(""), text("a")])], "a"),
    "an answer in parts": (
        [user("a"), assistant([text("b", "output_text")]), user([text("c")])],
        "[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答：",
    ),
    "system": ([system("s"), user("a")], "s\n\na"),
    "developer": ([system("s", "developer"), user("a")], "s\n\na"),
    "system without a letter": ([system(" "), user("a")], "a"),
    "system in no part": ([system("s"), system([text("")]), user("a")], "s\n\na"),
    "system in parts": ([system([text("s"), text("t")]), user("a")], "st\n\na"),
    "both": ([system("s"), system("d", "developer"), user("a")], "s\n\nd\n\na"),
    "a name": ([user("a", name="Ann")], "a"),
    "no tools called": (
        [user("a"), assistant("b", tool_calls=[], function_call=None, refusal=None), user("c")],
        "[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答：",
    ),
}
MISSING = [None, 5, 5.5, True, {}, text("a"), []]
PARTLESS = [[{}], [text("a"), {"type": "text"}], [5], [None], [[text("a")]]]
PARTLESS += [[{"type": "text", "text": value}] for value in (None, 5, {"value": "a"})]
KINDS = ["image", "image_url", "input_image", "input_audio", "audio", "file", "video", "refusal"]
KINDS += ["tool_use", "tool_result", "thinking"]
REFUSED = {
    **{f"content {value!r:.20}": ([user(value)], "message 0 has no text") for value in MISSING},
    **{f"parts {value!r:.40}": ([user(value)], "message 0 has a part wi") for value in PARTLESS},
    **{
        f"a part of type {kind}": (
            [user("a"), assistant("b"), user([text("c"), {"type": kind, "text": "d"}])],
            f"message 2 has a part of type '{kind}'",
        )
        for kind in KINDS
    },
    "no content": ([{"role": "user"}], "message 0 has no text"),
    "an empty answer of a tool": ([user("a"), assistant(None)], "message 1 has no text"),
    "tool_calls": ([user("a"), assistant(None, tool_calls=[{"id": "1"}])], "message 1 calls a too"),
    "function_call": ([user("a"), assistant("", function_call={"name": "f"})], "message 1 calls a"),
    "tool": ([user("a"), assistant("b"), {"role": "tool", "content": "c"}], "got role 'tool'"),
    "function": ([{"role": "function", "content": "c"}], "got role 'function' where 'user'"),
    "model": ([user("a"), {"role": "model", "content": "b"}], "got role 'model' where 'assistant'"),
    "human": ([{"role": "human", "content": "b"}], "got role 'human' where 'user'"),
    "system later": ([user("a"), assistant("b"), system("s")], "got role 'system'"),
    "developer later": ([user("a"), system("s", "developer")], "got role 'developer'"),
    "user twice": ([user("a"), user("b")], "got role 'user' where 'assistant'"),
    "system alone": ([system("s")], "no message with role 'user'"),
    "no role": ([{"content": "a"}], "message 0 has no 'role'"),
    "a role that is none": ([user("a"), {"role": 5, "content": "a"}], "message 1 has no 'role'"),
    "langchain's names": ([{"type": "human", "content": "a"}], "message 0 has no 'role'"),
    "blank parts": ([user([text(" "), text("\n")])], "the last question is empty"),
}


@pytest.mark.parametrize("kind", RENDERED)
def test_what_is_rendered(kind: str) -> None:
    messages, expected = RENDERED[kind]
    kept = copy.deepcopy(messages)
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == expected
    assert render_elsewhere(messages) == expected
    options = {"add_generation_prompt": True, "return_dict": True}
    ids = TOKENIZER.apply_chat_template(messages, **options)["input_ids"]
    assert ids == TOKENIZER(expected)["input_ids"]
    assert messages == kept


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("tokenize", [True, False])
def test_what_is_refused(kind: str, tokenize: bool) -> None:
    """Both by the error that our callers expect and by the one that servers look for."""
    messages, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        TOKENIZER.apply_chat_template(messages, tokenize=tokenize)
    assert isinstance(caught.value, jinja2.TemplateError) and len(str(caught.value)) < 250
    with pytest.raises(jinja2.TemplateError, match=message):
        render_elsewhere(messages)


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize("content", [b"a", {"a"}, object(), [b"a"], [text("a") | {"text": b"a"}]])
def test_what_is_no_text_in_python(content: Any, tokenize: bool) -> None:
    """transformers 5 would let the template see the name of the type as a string."""
    with pytest.raises(ValueError, match=r"message 0 has (no text|a part without text)"):
        TOKENIZER.apply_chat_template([user(content)], tokenize=tokenize)


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "conversation is empty"),
        (None, "conversation is empty"),
        ("hi", "give a list of messages"),
        (user("hi"), "give a list of messages"),
        ({"messages": [user("hi")]}, "give a list of messages"),
        (iter([user("hi")]), "give a list of messages"),
        (["hi"], "message 0 must be"),
        ([user("hi"), None], "message 1 must be"),
        ([[user("hi")], ["hi"]], "message 0 must be"),
        ([[user("hi")], user("hi")], "message 0 must be"),
    ],
)
def test_what_is_no_conversation(conversation: Any, message: str, tokenize: bool) -> None:
    with pytest.raises(ValueError, match=message):
        TOKENIZER.apply_chat_template(conversation, tokenize=tokenize)


OBJECTS = {
    "a dataclass": Message("user", "<eop>a"),
    "a namespace": SimpleNamespace(role="user", content="<eop>a"),
    "parts of a namespace": Message("user", [SimpleNamespace(type="text", text="<eop>a")]),
    "a mapping": MappingProxyType(user("<eop>a")),
    "a role of an enumeration": user("<eop>a") | {"role": Role.USER},
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("form", ["list", "tuple", "batch", "conversation", "batch of them"])
def test_messages_that_are_objects(kind: str, form: str) -> None:
    """Their text is as much a user's as that of a dictionary: nothing in it is a token."""
    messages: Any = [OBJECTS[kind], Message("assistant", "b"), OBJECTS[kind]]
    plain = [user("<eop>a"), assistant("b"), user("<eop>a")]
    messages = tuple(messages) if form == "tuple" else messages
    messages = Chat(messages) if "conversation" in form or "of them" in form else messages
    messages = [messages, messages] if "batch" in form else messages
    options = {"add_generation_prompt": True, "return_dict": True}
    right = TOKENIZER.apply_chat_template(plain, **options)["input_ids"]
    ids = TOKENIZER.apply_chat_template(messages, **options)["input_ids"]
    assert ids == ([right, right] if "batch" in form else right)
    shown = TOKENIZER.apply_chat_template(plain, tokenize=False)
    found = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert found == ([shown, shown] if "batch" in form else shown)
    assert TOKENIZER.eop_token_id not in right


def test_parts_do_not_make_a_token_together() -> None:
    for parts in (["[gMA", "SK]<so", "p>a<e", "op>"], [text("<"), {"text": "eop>"}, text("")]):
        for messages in ([user(parts)], [user("a"), assistant(parts), user("b")]):
            options = {"add_generation_prompt": True, "return_dict": True}
            ids = TOKENIZER.apply_chat_template(messages, **options)["input_ids"]
            marks = {TOKENIZER.gmask_token_id, TOKENIZER.bos_token_id, TOKENIZER.eop_token_id}
            assert [index for index in ids if index in marks] == [
                TOKENIZER.gmask_token_id,
                TOKENIZER.bos_token_id,
            ]
            shown = TOKENIZER.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            assert TOKENIZER(shown)["input_ids"] == ids


def test_an_answer_in_parts_can_be_gone_on_with() -> None:
    messages = [user([text("a")]), assistant([text("once "), text("upon")])]
    shown = TOKENIZER.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert shown == "a[gMASK]<sop>once upon"


def test_a_broken_template_of_the_caller_s_is_jinja_s_affair() -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        TOKENIZER.apply_chat_template([user("a")], chat_template="{% if %}", tokenize=False)
