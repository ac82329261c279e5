"""Owns dialogues that are neither messages nor columns: of MOSS, Firefly, XTuner, UltraChat.

Does not know which columns of a row they come from.
"""

import re
from typing import Any

from chatglm.data.dialogue import Dialogue
from chatglm.data.fields import Row, merge_system, read_system
from chatglm.data.messages import parse_json, read_talk
from chatglm.data.records import RowProblem

# The frame of a turn in MOSS's files: <|Human|>: ...<eoh>, <|MOSS|>: ...<eom>, [MOSS]: ...<eoa>.
MOSS_FRAME = re.compile(r"\A\s*(?:<\|\w+\|>:|\[\w+\]:)?\s*(.*?)\s*(?:<eo[a-z]>)?\s*\Z", re.DOTALL)
MOSS_TURN = re.compile(r"\[(Human|MOSS)\]: (.*?)(?:<eoh>|<eoa>|\Z)", re.DOTALL)
# What a turn of MOSS's third files holds beside its texts; "None" where no tool was called.
MOSS_TOOLS = ("Commands", "Tool Responses")
NO_TOOL = ("", "None")
# What the two sides of a turn are called.
SIDES = (("human", "assistant"), ("input", "output"))


def talk_in_turns(texts: list[Any], row: Row, name: str, system: str = "") -> Dialogue:
    """Return the dialogue of texts, a question first, each after the other."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return merge_system(read_talk(messages, name), system or read_system(row))


def read_moss(row: Row, key: str, *_: str) -> Dialogue:
    """Return the dialogue of a row of MOSS's third files, `turn_1` and so on.

    Raises:
        RowProblem: if it is none, or if a tool was called.
    """
    chat = parse_json(row[key]) if isinstance(row[key], str) else row[key]
    turns = list(chat.values()) if isinstance(chat, dict) else chat
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowProblem(f"{key} holds no turns of MOSS: {row[key]!r:.60}")
    texts = []
    for turn in turns:
        if any(_strip_moss(turn.get(tool) or "") not in NO_TOOL for tool in MOSS_TOOLS):
            raise RowProblem("a turn calls a tool, ChatGLM-6B knows none; take the row out")
        texts += [_strip_moss(turn.get(name)) for name in ("Human", "MOSS")]
    meta = row.get("meta_instruction")
    return talk_in_turns(texts, row, key, meta.strip() if isinstance(meta, str) else "")


def _strip_moss(text: Any) -> Any:
    found = MOSS_FRAME.match(text) if isinstance(text, str) else None
    return found[1] if found else text


def read_plain_moss(row: Row, key: str, *_: str) -> Dialogue:
    """Return the dialogue of a row of MOSS's second files, which is one text.

    Raises:
        RowProblem: if it is none.
    """
    turns = MOSS_TURN.findall(row[key]) if isinstance(row[key], str) else []
    if not turns:
        raise RowProblem(f"{key} holds no turns of MOSS: {row[key]!r:.60}")
    roles = {"Human": "user", "MOSS": "assistant"}
    messages = [{"role": roles[name], "content": text.strip()} for name, text in turns]
    meta = row.get("prefix")
    return merge_system(read_talk(messages, key), meta.strip() if isinstance(meta, str) else "")


def read_turn_pairs(row: Row, key: str, *_: str) -> Dialogue:
    """Return the dialogue of a list of turns that each hold both sides, or of messages.

    Firefly calls the sides `human` and `assistant`, XTuner `input` and `output`, with a `system` in
    the first turn and a mark whether its output is learned.

    Raises:
        RowProblem: if it is none.
    """
    turns = parse_json(row[key]) if isinstance(row[key], str) else row[key]
    names = next((names for names in SIDES if _have_keys(turns, names)), None)
    if names is None:
        return merge_system(read_talk(turns, key), read_system(row))
    messages: list[dict[str, Any]] = []
    for turn in turns:
        system = turn.get("system")
        messages += [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": turn[names[0]]})
        mark = turn.get("output_with_loss")
        messages.append({"role": "assistant", "content": turn[names[1]], "loss": mark})
    return merge_system(read_talk(messages, key), read_system(row))


def _have_keys(turns: Any, names: tuple[str, str]) -> bool:
    """Say whether all turns of a list have two keys."""
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and set(names) <= set(turn) for turn in turns
    )


def read_conversations(row: Row, key: str, *_: str) -> Dialogue:
    """Return the dialogue of ShareGPT's messages, or of LIMA's texts in turns."""
    value = parse_json(row[key]) if isinstance(row[key], str) else row[key]
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return talk_in_turns(value, row, key)
    return merge_system(read_talk(value, key), read_system(row))


def read_bare_turns(row: Row, key: str, *_: str) -> Dialogue:
    """Return the dialogue of a list of texts, a question first (UltraChat).

    Raises:
        RowProblem: if it is none.
    """
    texts = parse_json(row[key]) if isinstance(row[key], str) else row[key]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowProblem(f"{key} is no list of texts, a question first: {row[key]!r:.60}")
    return talk_in_turns(texts, row, key)


__all__ = [
    "read_bare_turns",
    "read_conversations",
    "read_moss",
    "read_plain_moss",
    "read_turn_pairs",
]
