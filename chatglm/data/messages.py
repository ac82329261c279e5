"""Owns lists of messages: roles under their many names, texts and parts of texts, marks.

Reads OpenAI's messages (`role`, `content`), ShareGPT's (`from`, `value`) and anything between, and
dialogues written into one text. Does not know which column of a row they come from.
"""

import json
import re
from typing import Any

from chatglm.data.dialogue import Dialogue
from chatglm.data.records import SYSTEM_END, RowProblem

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
ROLES = {
    **dict.fromkeys((USER, "human", "prompter"), USER),
    **dict.fromkeys((ASSISTANT, "gpt", "bing", "chatgpt", "bard", "model", "bot"), ASSISTANT),
    **dict.fromkeys((SYSTEM, "developer"), SYSTEM),
}
TOOL_ROLES = ("tool", "tools", "function", "function_call", "observation", "ipython")
TOOL_ROLES += ("tool_call", "tool_response", "function_response")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
PART_TYPES = ("text", "input_text", "output_text")
# Keys of a message that say whether its answer is learned, and the value that takes it out.
MARKS = {"weight": 0, "loss": 0, "train": 0, "training": 0, "train_on_turn": 0, "masked": 1}
# Marks that would be left out of what is learned without a word.
UNKNOWN_MARKS = ("train_detail", "training_detail", "loss_scale")
REMEDY = "take the row out"
# Who speaks in a dialogue that is one text: HH-RLHF leaves an empty line before, BELLE none.
SPEAKERS = (
    re.compile(r"\n\n(Human|Assistant):"),
    re.compile(r"(?:\A|\n)(Human|Assistant):"),
)


def read_talk(value: Any, name: str = "messages") -> Dialogue:
    """Return the dialogue of a list of messages, its system messages joined.

    Args:
        value: the list; or the text of one in JSON, as csv files hold it; or a dialogue in one text
            ("Human: ... Assistant: ...").
        name: of the column, for messages to people.

    Raises:
        RowProblem: naming the message that is in the wrong place, calls a tool or has no text.
    """
    turns: list[tuple[str, str, bool]] = []
    system: list[str] = []
    for i, message in enumerate(list_messages(value, name)):
        role, text = read_message(message, i)
        due = (USER, ASSISTANT)[len(turns) % 2]
        if role == SYSTEM and not turns:
            system.append(text)
        elif role == due:
            turns.append((role, text, read_mark(message, role, i)))
        else:
            raise RowProblem(describe_disorder(message, i, due, has_begun=bool(turns)))
    if not turns:
        raise RowProblem(f"{name} holds no question")
    pairs = [
        (question, answer) for (_, question, _), (_, answer, _) in zip(turns[::2], turns[1::2])
    ]
    marks = tuple(mark for _, _, mark in turns[1::2])
    if len(turns) % 2:
        pairs.append((turns[-1][1], ""))
        marks = (*marks, True)
    return Dialogue(pairs, join_system(system), marks, teaches_all=True)


def list_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the messages of a column.

    Raises:
        RowProblem: if it holds none.
    """
    if isinstance(value, str):
        value = read_transcript(value) if is_transcript(value) else parse_json(value)
    if isinstance(value, dict):
        value = _split_columns(value)
    if not isinstance(value, list) or not value:
        raise RowProblem(f"{name} is no list of messages: {value!r:.60}")
    for message in value:
        if not isinstance(message, dict):
            raise RowProblem(f"{name} holds what is no message: {message!r:.60}")
    return value


def _split_columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return messages of one message, or of a list for each key, as `datasets` makes of them."""
    if not value or not all(isinstance(items, list) for items in value.values()):
        return [value]
    return [dict(zip(value, items)) for items in zip(*value.values())]


def parse_json(text: str) -> Any:
    """Return the list or object that a text holds, as columns of csv files do; else the text."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_message(message: dict[str, Any], number: int) -> tuple[str, str]:
    """Return the role of a message and its text.

    Raises:
        RowProblem: if it has none or another than ours, or is about tools.
    """
    place = f"message {number}"
    role = next((message[key] for key in ROLE_KEYS if message.get(key) is not None), None)
    if not isinstance(role, str):
        raise RowProblem(
            f"{place} has no role ({' or '.join(ROLE_KEYS)}): {message!r:.60}; if it has another "
            "name, say so with columns: role_tag=NAME content_tag=NAME"
        )
    plain = role.strip().lower()
    if plain in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise RowProblem(f"{place} ({role!r:.30}) is about a tool, ChatGLM-6B knows none; {REMEDY}")
    if plain not in ROLES:
        raise RowProblem(
            f"{place} has the role {role!r:.30}, which is none of {', '.join(ROLES)}; say what it "
            "is with columns: user_tag=NAME, assistant_tag=NAME or system_tag=NAME"
        )
    content = next((message[key] for key in CONTENT_KEYS if message.get(key) is not None), None)
    text = join_parts(content, place)
    if ROLES[plain] != SYSTEM and not text.strip():
        raise RowProblem(f"a message is empty: {place} ({role!r:.30}); {REMEDY}")
    return ROLES[plain], text


def join_parts(content: Any, place: str) -> str:
    """Return the text of a message's content; parts of text are joined, as in the chat template.

    Raises:
        RowProblem: if a part is no text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        wanted = f"{' or '.join(CONTENT_KEYS)}: a string, or parts of type text"
        raise RowProblem(f"{place} has no text as its content ({wanted}): {content!r:.60}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if kind and kind not in PART_TYPES:
            raise RowProblem(
                f"{place} has a part of type {kind!r:.30}, ChatGLM-6B reads text alone"
            )
        if not isinstance(text, str):
            raise RowProblem(f"{place} has a part without text: {part!r:.60}")
        texts.append(text)
    return "".join(texts)


def read_mark(message: dict[str, Any], role: str, number: int) -> bool:
    """Return whether a message may be learned, as it says itself.

    Raises:
        RowProblem: for a mark that is neither yes nor no, that asks for a question to be learned,
            or that goes against another one.
    """
    for key in UNKNOWN_MARKS:
        if message.get(key) is not None:
            raise RowProblem(
                f"message {number} has {key!r}, which is not known here: answers are learned whole "
                "or not at all; write weight: 0 or 1"
            )
    marks = {key: message[key] for key in MARKS if message.get(key) is not None}
    for key, value in marks.items():
        # True and 1.0 are equal to 1 in Python.
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowProblem(
                f"message {number} has {key}: {value!r:.30}; only 0 and 1 (false and true) are "
                "known: repeat rows that should weigh more"
            )
    learned = {bool(value != MARKS[key]) for key, value in marks.items()}
    if len(learned) > 1:
        raise RowProblem(f"message {number} has marks that go against each other: {marks}")
    if role == USER and True in learned and "masked" not in marks:
        raise RowProblem(f"message {number} is a question that is marked to be learned: {marks}")
    return False not in learned


def describe_disorder(message: dict[str, Any], number: int, due: str, has_begun: bool) -> str:
    """Return what is wrong with the order of messages."""
    role = next(message[key] for key in ROLE_KEYS if message.get(key) is not None)
    told = f"role {role!r:.30} where {due!r} was due (message {number})"
    if ROLES[role.strip().lower()] == SYSTEM:
        return f"{told}: system messages come first; {REMEDY}, or put it there"
    if not has_begun:
        return f"{told}: a dialogue begins with a question; {REMEDY}, or its first answer"
    return f"{told}: questions and answers take turns; {REMEDY}, or join the two messages"


def join_system(texts: list[str]) -> str:
    """Return one system text of several, those without a letter left out."""
    return SYSTEM_END.join(text for text in texts if text.strip())


def is_transcript(text: str) -> bool:
    """Say whether a text is a whole dialogue, as in HH-RLHF and BELLE: "Human: ... Assistant: "."""
    return text.lstrip().startswith("Human:") and len(find_speakers(text)) > 1


def find_speakers(text: str) -> list[re.Match[str]]:
    """Return the places of a text where somebody begins to speak."""
    return list(SPEAKERS[not text.startswith("\n\n")].finditer(text))


def read_transcript(text: str) -> list[dict[str, Any]]:
    """Return the messages of a dialogue in one text; an answer without words is still due."""
    found = find_speakers(text)
    ends = [*(match.start() for match in found[1:]), len(text)]
    texts = [text[match.end() : end].strip() for match, end in zip(found, ends)]
    roles = [match[1].lower() for match in found]
    if roles[-1] == ASSISTANT and not texts[-1]:
        roles, texts = roles[:-1], texts[:-1]
    return [{"role": role, "content": said} for role, said in zip(roles, texts)]


__all__ = ["is_transcript", "join_system", "list_messages", "parse_json", "read_talk"]
