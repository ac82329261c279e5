"""Messages as the chat template takes them, read from what callers have.

Owns: which objects are messages, and which contents are text in parts.

Does not know: the template, tokens or ids.
"""

from collections.abc import Mapping
from typing import Any

from .fragments_chatglm import ESCAPE, FALSE_MARK

TEXT_PARTS = ("text", "input_text", "output_text")  # as the template has them


def read_messages(value: Any) -> Any:
    """A copy of messages, or of a part of one, with contents in one piece, as in the template."""
    value = getattr(value, "messages", value)  # a batch may hold objects with messages
    if isinstance(value, (list, tuple)):
        return [read_messages(item) for item in value]
    if hasattr(value, "__dict__") and not isinstance(value, (str, Mapping)):
        value = vars(value)
    if not isinstance(value, Mapping):
        return value if isinstance(value, (str, int, float)) else None  # 5 would show their types
    fields = dict(value)
    fields.update({key: read_messages(fields[key]) for key in ("content", "text") if key in fields})
    parts = fields.get("content")
    if isinstance(parts, list) and parts:
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in parts]
        kinds = [part.get("type") or "text" for part in parts if isinstance(part, dict)]
        if all(isinstance(text, str) for text in texts) and all(k in TEXT_PARTS for k in kinds):
            fields["content"] = "".join(texts)
    return fields


def check_messages(messages: list[Any], is_shown: bool) -> None:
    """Refuse what is no message; change an answer that is shown at the end as `FALSE_MARK` says."""
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} must be a dictionary with 'role' and 'content'")
    last = messages[-1] if messages else {}
    if is_shown and last.get("role") == "assistant" and isinstance(last.get("content"), str):
        last["content"] = FALSE_MARK.sub(rf"\g<0>{ESCAPE}", last["content"])
