"""Owns the table of dialects: the forms that rows of the world's trainers have.

Each has a name, the keys that show it, an example, and the function that reads it; the documents,
`chatglm data` and the tests are made from here. Does not know how a row's form is found.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chatglm.data.chats import (
    read_bare_turns,
    read_conversations,
    read_moss,
    read_plain_moss,
    read_turn_pairs,
)
from chatglm.data.dialogue import Dialogue
from chatglm.data.fields import (
    ANSWERS,
    PARTS,
    QUESTIONS,
    SYSTEMS,
    Row,
    merge_system,
    read_fields,
    read_question,
    read_renamed,
    read_scored,
    read_system,
    read_text,
)
from chatglm.data.messages import read_talk
from chatglm.data.pairs import (
    TALKS,
    read_openai_pair,
    read_preference,
    read_second,
    read_two_answers,
)

# What a row is read for: answers (sft, ptuning, eval), pairs (reward, dpo), prompts (ppo, grpo) and
# texts (pretrain).
ANSWERING = frozenset({"answers", "prompts"})
COMPARING = frozenset({"pairs", "prompts"})
SCORED = ANSWERING | COMPARING
ASKING = frozenset({"prompts"})
PLAIN = frozenset({"texts"})
# What may stand beside a question, and what may come before a pair.
BESIDE = (*PARTS, "prefix", "history", *SYSTEMS)
LEADS = (*QUESTIONS, *BESIDE, *TALKS, "kind")


@dataclass(frozen=True)
class Dialect:
    """A form of row.

    Attributes:
        name: for `dialect: NAME`.
        keys: that show it: a row of it has them all.
        read: makes a dialogue of a row, given the keys.
        aims: what rows of it can be read for: "answers", "pairs", "prompts" or "texts".
        meaning: whose it is, or what it is, in a phrase; "" for forms that need no mention.
        example: a row of it.
        beside: keys that it reads too, where they are there.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[..., Dialogue]
    aims: frozenset[str]
    meaning: str
    example: dict[str, Any]
    beside: tuple[str, ...] = ()

    @property
    def known(self) -> frozenset[str]:
        """All keys that it reads."""
        return frozenset((*self.keys, *self.beside))

    def covers(self, other: "Dialect") -> bool:
        """Say whether what shows the other one is but a part of this one."""
        if set(other.keys) < set(self.keys):
            return True
        return self.known >= set(other.keys) and not other.known >= set(self.keys)


def read_messages(row: Row, key: str, *_: str) -> Dialogue:
    """Return the dialogue of a column of messages, with the system text beside it."""
    return merge_system(read_talk(row[key], key), read_system(row))


def read_plain(row: Row, key: str, *_: str) -> Dialogue:
    """Return a text, as a question without an answer."""
    return Dialogue([(read_text(row, key, "no text"), "")])


def _say(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


ASK, GOOD, BAD = "What is a llama?", "An animal of the Andes.", "A car."
TALK = [_say("user", ASK), _say("assistant", GOOD)]
WORSE = [_say("user", ASK), _say("assistant", BAD)]
TAGGED = [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}]
HUMAN = f"\n\nHuman: {ASK}\n\nAssistant: "
PAST = [["Hi", "Hello!"]]


def _columns(name: str, keys: tuple[str, ...], meaning: str, **example: Any) -> Dialect:
    return Dialect(name, keys, read_fields, ANSWERING, meaning, example, BESIDE)


def _talk(
    name: str, key: str, read: Any, meaning: str, value: Any, beside: str = "system", **more: Any
) -> Dialect:
    beside_it = SYSTEMS if beside == "system" else (beside,)
    return Dialect(name, (key,), read, ANSWERING, meaning, {key: value, **more}, beside_it)


def _pair(name: str, keys: tuple[str, ...], read: Any, meaning: str, **example: Any) -> Dialect:
    beside = (*LEADS, *ANSWERS) if read is read_second else LEADS
    aims = COMPARING - {"prompts"} if read is read_two_answers else COMPARING
    return Dialect(name, keys, read, aims, meaning, example, beside)


TALKING = (
    _talk("messages", "messages", read_messages, "OpenAI, ms-swift, trl", TALK),
    _talk(
        "sharegpt", "conversations", read_conversations, "ShareGPT, LLaMA-Factory, BELLE",
        TAGGED, system="Be brief.",
    ),
    _talk(
        "turn_pairs", "conversation", read_turn_pairs, "Firefly's dialogues, XTuner",
        [{"human": ASK, "assistant": GOOD}],
    ),
    _talk("ultrachat", "data", read_bare_turns, "UltraChat", [ASK, GOOD]),
    _talk(
        "moss", "chat", read_moss, "MOSS 003",
        {"turn_1": {"Human": f"<|Human|>: {ASK}<eoh>\n", "MOSS": f"<|MOSS|>: {GOOD}<eom>\n"}},
        "meta_instruction",
    ),
    _talk(
        "moss_plain", "plain_text", read_plain_moss, "MOSS 002",
        f"[Human]: {ASK}<eoh> [MOSS]: {GOOD}<eoa>", "prefix",
    ),
)  # fmt: skip
FIELDED = (
    _columns(
        "prompt_response", ("prompt", "response"), "the official scripts' columns",
        prompt=ASK, response=GOOD, history=PAST,
    ),
    _columns(
        "alpaca", ("instruction", "output"), "Alpaca, LLaMA-Factory, BELLE, COIG",
        instruction="Translate.", input="llama", output="羊驼",
    ),
    _columns(
        "query_response", ("query", "response"), "ms-swift",
        query=ASK, response=GOOD, history=PAST, system="Be brief.",
    ),
    _columns(
        "prompt_completion", ("prompt", "completion"), "trl; texts or messages",
        prompt=[TALK[0]], completion=[TALK[1]],
    ),
    _columns("question_answer", ("question", "answer"), "", question=ASK, answer=GOOD),
    _columns(
        "dolly", ("instruction", "response"), "Dolly",
        instruction="Who?", context="Ada wrote it.", response="Ada.",
    ),
    _columns("input_output", ("input", "output"), "", input=ASK, output=GOOD),
    _columns("firefly", ("input", "target"), "Firefly, BELLE", kind="QA", input=ASK, target=GOOD),
    _columns(
        "chatglm_tuning", ("context", "target"), "ChatGLM-Tuning",
        context="Instruction: Translate.\nInput: llama\nAnswer: ", target="羊驼",
    ),
    Dialect(
        "coig_translated", ("trans_instruction", "trans_output"), read_renamed, ANSWERING,
        "COIG", {"trans_instruction": "翻译。", "trans_input": "llama", "trans_output": "羊驼"},
        ("trans_input",),
    ),
    Dialect(
        "coig_exam", ("textbox_question", "textbox_answer"), read_renamed, ANSWERING, "COIG",
        {"textbox_q_instruction": "选择。", "textbox_question": "A. 1 B. 2", "textbox_answer": "A"},
        ("textbox_q_instruction", "textbox_q_context"),
    ),
    Dialect(
        "scored", ("answers",), read_scored, SCORED, "the fork: answers with scores",
        {
            "prompt": ASK, "prefix": "", "system": "Be brief.",
            "answers": [{"answer": GOOD, "score": 2.5}, {"answer": BAD, "score": 0}],
        },
        (*QUESTIONS, *BESIDE, "kind"),
    ),
)  # fmt: skip
COMPARED = (
    _pair(
        "chosen_rejected", ("chosen", "rejected"), read_preference,
        "trl, UltraFeedback, HH-RLHF, LLaMA-Factory; texts, messages or whole dialogues",
        prompt=ASK, chosen=GOOD, rejected=BAD,
    ),
    _pair(
        "medical_gpt", ("response_chosen", "response_rejected"), read_preference, "MedicalGPT",
        system="Be brief.", history=PAST, question=ASK, response_chosen=GOOD, response_rejected=BAD,
    ),
    _pair(
        "openai_preference", ("preferred_output", "non_preferred_output"), read_openai_pair,
        "OpenAI", input={"messages": TALK[:1]}, preferred_output=TALK[1:],
        non_preferred_output=WORSE[1:],
    ),
    *(
        _pair(name, keys, read_preference, "", question=ASK, **dict(zip(keys, (GOOD, BAD))))
        for name, keys in (
            ("chosen_response", ("chosen_response", "rejected_response")),
            ("stack_exchange", ("response_j", "response_k")),
        )
    ),
    _pair(
        "rejected_response", ("rejected_response",), read_second, "ms-swift",
        messages=TALK, rejected_response=BAD,
    ),
    _pair(
        "rejected_messages", ("rejected_messages",), read_second, "ms-swift",
        messages=TALK, rejected_messages=WORSE,
    ),
    _pair(
        "two_outputs", ("instruction", "output"), read_two_answers, "LLaMA-Factory of 2023",
        instruction=ASK, input="", output=[GOOD, BAD],
    ),
)  # fmt: skip
TEXTS = tuple(
    Dialect(key, (key,), read_plain, PLAIN, meaning, {key: GOOD})
    for key, meaning in (("text", "plain text"), ("content", ""))
)
# Questions without answers, and columns that are named in two habits at once.
ALONE = tuple(
    Dialect(
        key, (key,), read_question, ASKING, "a question" * (key == "prompt"), {key: ASK}, BESIDE
    )
    for key in (*QUESTIONS, "input")
)
TAKEN = {dialect.keys for dialect in FIELDED}
MIXED = tuple(
    _columns(f"{question}_{answer}", (question, answer), "", **{question: ASK, answer: GOOD})
    for question in QUESTIONS
    for answer in ANSWERS
    if (question, answer) not in TAKEN
)
DIALECTS = (*TALKING, *FIELDED, *COMPARED, *TEXTS, *ALONE, *MIXED)
BY_NAME = {dialect.name: dialect for dialect in DIALECTS}

__all__ = ["BY_NAME", "DIALECTS", "Dialect"]
