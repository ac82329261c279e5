"""Rows of every dialect, each with what it is to be read as; for tests of whatever reads rows.

`ROWS` has the rows by the name of their dialect, `REFUSED` those that no reader may take, with a
part of the reason. A row stands as it does in the files of the projects that it is named for.
"""

from typing import Any, NamedTuple

Q, A, B = "你好？", "你好！", "I do not know."
Q2, A2 = "why?", "because."
S = "Be brief."
USER, BOT, SYSTEM = ({"role": r} for r in ("user", "assistant", "system"))
ASK, SAY, SAY_B = USER | {"content": Q}, BOT | {"content": A}, BOT | {"content": B}
ASK2, SAY2 = USER | {"content": Q2}, BOT | {"content": A2}
RULE = SYSTEM | {"content": S}


class Expected(NamedTuple):
    """A record, without its source and the name of its dialect."""

    history: list[tuple[str, str]]
    query: str
    answer: str = ""
    rejected: str = ""
    kind: str = ""
    system: str = ""


class Case(NamedTuple):
    """A row, what it is read for, and the records that it holds."""

    row: dict[str, Any]
    aim: str
    records: list[Expected]


def answers(row: dict[str, Any], *records: Expected) -> Case:
    return Case(row, "answers", list(records))


def pairs(row: dict[str, Any], *records: Expected) -> Case:
    return Case(row, "pairs", list(records))


def prompts(row: dict[str, Any], *records: Expected) -> Case:
    return Case(row, "prompts", list(records))


def tagged(*texts: str, tags: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": tags[i % 2], "value": text} for i, text in enumerate(texts)]


ONE = Expected([], Q, A)
RULED = Expected([], Q, A, system=S)
FIRST, SECOND = ONE, Expected([(Q, A)], Q2, A2)
PAIR = Expected([], Q, A, B)
PAIR2 = Expected([(Q, A)], Q2, A2, B)
TALK2 = [ASK, SAY, ASK2, SAY2]
WORSE2 = [ASK, SAY, ASK2, SAY_B]
HH = f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman: {Q2}\n\nAssistant:"

ROWS: dict[str, list[Case]] = {
    "messages": [
        answers({"messages": TALK2}, FIRST, SECOND),
        answers({"messages": [RULE, ASK, SAY]}, RULED),
        answers({"messages": [ASK, SAY], "system": S}, RULED),
        answers({"messages": [RULE, ASK, SAY], "system": S}, RULED),
        answers({"messages": [{"role": "developer", "content": S}, ASK, SAY]}, RULED),
        answers(
            {"messages": [RULE, SYSTEM | {"content": "Be kind."}, ASK, SAY]},
            RULED._replace(system=f"{S}\n\nBe kind."),
        ),
        answers({"messages": [USER | {"content": [{"type": "text", "text": Q}]}, SAY]}, ONE),
        answers(
            {"messages": [USER | {"content": [{"text": Q[:2]}, Q[2:]]}, SAY], "id": 3},
            ONE,
        ),
        answers({"messages": [ASK, SAY], "tools": [], "images": None}, ONE),
        answers({"messages": [ASK, SAY | {"tool_calls": None, "weight": None}]}, ONE),
        answers({"messages": [ASK, SAY, ASK2]}, ONE),
        answers({"messages": [ASK, SAY | {"weight": 0}, ASK2, SAY2 | {"weight": 1}]}, SECOND),
        answers({"messages": [ASK, SAY | {"loss": False}, ASK2, SAY2]}, SECOND),
        answers({"messages": [ASK, SAY | {"loss": True}, ASK2, SAY2 | {"loss": False}]}, FIRST),
        answers({"messages": [ASK, SAY | {"masked": True}, ASK2, SAY2]}, SECOND),
        answers({"messages": [ASK, SAY | {"train_on_turn": 0}, ASK2, SAY2]}, SECOND),
        answers({"messages": [ASK, SAY], "prompt": Q, "response": A}, ONE),
        answers({"messages": [ASK, SAY], "prompt": None, "response": None}, ONE),
        answers({"messages": [ASK, SAY], "instruction": "", "output": ""}, ONE),
        answers({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", '
                 '"content": "a"}]'}, Expected([], "q", "a")),
        answers({"messages": {"role": ["user", "assistant"], "content": [Q, A]}}, ONE),
        prompts({"messages": [RULE, ASK]}, Expected([], Q, system=S)),
        prompts({"messages": TALK2}, SECOND),
        prompts({"messages": TALK2, "prompt": Q, "prompt_id": "7"}, SECOND),
    ],
    "sharegpt": [
        answers({"conversations": tagged(Q, A, Q2, A2)}, FIRST, SECOND),
        answers({"conversations": tagged(Q, A), "system": S, "tools": "[]"}, RULED),
        answers({"conversations": [{"from": "system", "value": S}, *tagged(Q, A)]}, RULED),
        answers({"conversations": [ASK, SAY], "id": "x"}, ONE),
        answers({"conversations": [Q, A, Q2, A2], "source": "lima"}, FIRST, SECOND),
        answers({"conversations": tagged(Q, A), "system_prompt": S}, RULED),
        answers({"conversations": tagged(Q, A, tags=("user", "chatgpt"))}, ONE),
        answers({"conversations": tagged(Q, A, tags=("human", "bing"))}, ONE),
        answers({"conversations": tagged(Q, A, tags=("Human", "Assistant"))}, ONE),
        answers({"conversations": [{"from": "human", "value": Q, "role": None}, *tagged(Q, A)[1:]]},
                ONE),
        prompts({"conversations": tagged(Q)}, Expected([], Q)),
    ],
    "prompt_response": [
        answers({"prompt": f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman: {Q2}\n\nAssistant:",
                 "response": A2, "chosen": A2, "rejected": B}, SECOND),
        answers({"prompt": Q, "response": A}, ONE),
        answers({"prompt": Q, "response": A, "history": []}, ONE),
        answers({"prompt": Q2, "response": A2, "history": [[Q, A]]}, SECOND),
        answers({"prompt": Q2, "response": A2, "history": '[["你好？", "你好！"]]'}, SECOND),
        answers({"prompt": Q2, "response": A2, "history": [ASK, SAY]}, SECOND),
        answers({"prompt": Q2, "response": A2, "history": [[Q, A]], "system": S},
                SECOND._replace(system=S)),
        answers({"prompt": [RULE, ASK], "response": A}, RULED),
        answers({"prompt": Q, "response": A, "history": "", "system": ""}, ONE),
        prompts({"prompt": Q, "response": A}, ONE),
    ],
    "alpaca": [
        answers({"instruction": Q, "input": "", "output": A}, ONE),
        answers({"instruction": Q, "input": None, "output": A}, ONE),
        answers({"instruction": Q, "output": A}, ONE),
        answers({"instruction": "do", "input": "this", "output": A}, Expected([], "do\nthis", A)),
        answers({"instruction": "do", "input": "this", "output": A, "text": "..."},
                Expected([], "do\nthis", A)),
        answers({"instruction": Q2, "input": "", "output": A2, "history": [[Q, A]], "system": S},
                SECOND._replace(system=S)),
        answers({"instruction": f"Human:{Q}\nAssistant:{A}\nHuman:{Q2}\nAssistant:", "input": "",
                 "output": A2}, SECOND),
        prompts({"instruction": Q, "input": "", "output": A}, ONE),
    ],
    "query_response": [
        answers({"query": Q, "response": A}, ONE),
        answers({"system": S, "query": Q2, "response": A2, "history": [[Q, A]]},
                SECOND._replace(system=S)),
    ],
    "prompt_completion": [
        answers({"prompt": Q, "completion": A}, ONE),
        answers({"prompt": [ASK], "completion": [SAY]}, ONE),
        answers({"prompt": [RULE, ASK, SAY, ASK2], "completion": [SAY2]},
                SECOND._replace(system=S)),
        answers({"prompt": Q, "completion": [SAY]}, ONE),
    ],
    "question_answer": [
        answers({"question": Q, "answer": A}, ONE),
        prompts({"question": Q, "answer": A}, ONE),
    ],
    "dolly": [
        answers({"instruction": Q, "response": A}, ONE),
        answers({"instruction": Q, "context": "", "response": A, "category": "qa"}, ONE),
        answers({"instruction": "do", "context": "this", "response": A},
                Expected([], "do\nthis", A)),
    ],
    "input_output": [
        answers({"input": Q, "output": A}, ONE),
        answers({"instruction": "", "input": Q, "output": A}, ONE),
    ],
    "firefly": [answers({"kind": "NLI", "input": Q, "target": A}, ONE)],
    "turn_pairs": [
        answers({"conversation": [{"system": S, "input": Q, "output": A, "output_with_loss": False},
                                  {"input": Q2, "output": A2}]}, SECOND._replace(system=S)),
        answers({"conversation_id": 1, "category": "x", "conversation": [
            {"human": Q, "assistant": A}, {"human": Q2, "assistant": A2}]}, FIRST, SECOND),
        answers({"conversation": [ASK, SAY]}, ONE),
    ],
    "chatglm_tuning": [answers({"context": Q, "target": A}, ONE)],
    "question_response": [
        answers({"id": "x", "system_prompt": S, "question": Q, "response": A}, RULED),
    ],
    "ultrachat": [answers({"id": "0", "data": [Q, A, Q2, A2]}, FIRST, SECOND)],
    "moss": [
        answers({"conversation_id": "1", "meta_instruction": S + "\n", "num_turns": 2, "chat": {
            "turn_1": {"Human": f"<|Human|>: {Q}<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: "
                       "None<eot>\n", "Commands": "<|Commands|>: None<eoc>\n", "Tool Responses":
                       "<|Results|>: None<eor>\n", "MOSS": f"<|MOSS|>: {A}<eom>\n"},
            "turn_2": {"Human": f"<|Human|>: {Q2}<eoh>\n", "MOSS": f"<|MOSS|>: {A2}<eom>\n"}}},
            FIRST._replace(system=S), SECOND._replace(system=S)),
    ],
    "moss_plain": [
        answers({"prefix": S, "num_turns": 2, "plain_text":
                 f"[Human]: {Q}<eoh> [MOSS]: {A}<eoa> [Human]: {Q2}<eoh> [MOSS]: {A2}<eoa>"},
                FIRST._replace(system=S), SECOND._replace(system=S)),
    ],
    "coig_translated": [
        answers({"trans_instruction": "do", "trans_input": "this", "trans_output": A},
                Expected([], "do\nthis", A)),
    ],
    "coig_exam": [
        answers({"textbox_q_instruction": "do", "textbox_q_context": "", "textbox_question": "this",
                 "textbox_answer": A, "textbox_answer_analysis": "so"},
                Expected([], "do\nthis", A)),
    ],
    "scored": [
        answers({"prompt": Q, "answers": [{"answer": B, "score": 1}, {"answer": A, "score": 2}]},
                ONE),
        pairs({"prompt": Q, "prefix": "", "system": S, "answers": [
            {"answer": A, "score": "2"}, {"answer": B, "score": 1}, {"answer": "c", "score": 1}]},
            PAIR._replace(system=S)),
        answers({"prompt": "do", "prefix": " this", "answers": [{"answer": A, "score": 0}]},
                Expected([], "do this", A)),
    ],
    "chosen_rejected": [
        pairs({"prompt": Q, "chosen": A, "rejected": B}, PAIR),
        pairs({"prompt": Q, "chosen": A, "rejected": B, "kind": "vague", "history": []},
              PAIR._replace(kind="vague")),
        pairs({"prompt": Q2, "history": [[Q, A]], "chosen": A2, "rejected": B}, PAIR2),
        pairs({"prompt": [ASK], "chosen": [SAY], "rejected": [SAY_B]}, PAIR),
        pairs({"prompt": Q, "chosen": [SAY], "rejected": [SAY_B]}, PAIR),
        pairs({"prompt": [RULE, ASK, SAY, ASK2], "chosen": [SAY2], "rejected": [SAY_B]},
              PAIR2._replace(system=S)),
        pairs({"prompt": [ASK], "chosen": [SAY, ASK2, SAY2], "rejected": [SAY, ASK2, SAY_B]},
              PAIR2),
        pairs({"chosen": TALK2, "rejected": WORSE2}, PAIR2),
        pairs({"chosen": [RULE, ASK, SAY], "rejected": [RULE, ASK, SAY_B]},
              PAIR._replace(system=S)),
        pairs({"prompt": Q, "prompt_id": "1", "messages": TALK2, "chosen": TALK2,
               "rejected": WORSE2, "score_chosen": 8.0, "score_rejected": 3.5}, PAIR2),
        pairs({"prompt": Q2, "chosen": TALK2, "rejected": WORSE2}, PAIR2),
        pairs({"chosen": f"{HH} {A2}", "rejected": f"{HH} {B}"}, PAIR2),
        pairs({"prompt": HH, "chosen": A2, "rejected": B}, PAIR2),
        pairs({"prompt": HH, "chosen": f"{HH} {A2}", "rejected": f"{HH} {B}"}, PAIR2),
        pairs({"prompt": [RULE, ASK], "chosen": [RULE, ASK, SAY], "rejected": [RULE, ASK, SAY_B]},
              PAIR._replace(system=S)),
        pairs({"conversations": tagged(Q), "chosen": {"from": "gpt", "value": A},
               "rejected": {"from": "gpt", "value": B}}, PAIR),
        pairs({"conversations": tagged(Q, A, Q2), "system": S, "chosen": {"from": "gpt",
               "value": A2}, "rejected": {"from": "gpt", "value": B}}, PAIR2._replace(system=S)),
        pairs({"instruction": Q, "input": "", "chosen": A, "rejected": B}, PAIR),
        pairs({"question": Q, "chosen": A, "rejected": B, "label": 1}, PAIR),
        prompts({"chosen": f"{HH} {A2}", "rejected": f"{HH} {B}"}, SECOND),
        prompts({"prompt": Q, "chosen": A, "rejected": B}, ONE),
    ],
    "medical_gpt": [
        pairs({"system": "", "history": [], "question": Q, "response_chosen": A,
               "response_rejected": B}, PAIR),
        pairs({"system": S, "history": [[Q, A]], "question": Q2, "response_chosen": A2,
               "response_rejected": B}, PAIR2._replace(system=S)),
    ],
    "openai_preference": [
        pairs({"input": {"messages": [RULE, ASK], "tools": [], "parallel_tool_calls": True},
               "preferred_output": [SAY], "non_preferred_output": [SAY_B]},
              PAIR._replace(system=S)),
    ],
    "chosen_response": [
        pairs({"instruction": Q, "chosen_response": A, "rejected_response": B}, PAIR),
    ],
    "stack_exchange": [pairs({"question": Q, "response_j": A, "response_k": B}, PAIR)],
    "rejected_response": [
        pairs({"query": Q, "response": A, "rejected_response": B}, PAIR),
        pairs({"system": S, "query": Q2, "response": A2, "history": [[Q, A]],
               "rejected_response": B}, PAIR2._replace(system=S)),
        pairs({"messages": TALK2, "rejected_response": B}, PAIR2),
    ],
    "rejected_messages": [pairs({"messages": TALK2, "rejected_messages": WORSE2}, PAIR2)],
    "two_outputs": [pairs({"instruction": Q, "input": "", "output": [A, B]}, PAIR)],
    "text": [Case({"text": A, "meta": {}}, "texts", [Expected([], A)])],
    "content": [Case({"content": A}, "texts", [Expected([], A)])],
    "prompt": [prompts({"prompt": Q}, Expected([], Q)),
               prompts({"prompt": Q2, "history": [[Q, A]], "system": S},
                       Expected([(Q, A)], Q2, system=S)),
               prompts({"prompt": Q, "response": ""}, Expected([], Q)),
               prompts({"prompt": Q, "answer": 42}, Expected([], Q)),
               prompts({"prompt": [RULE, ASK]}, Expected([], Q, system=S))],
    "question": [prompts({"question": Q, "answer": None}, Expected([], Q))],
    "query": [prompts({"query": Q}, Expected([], Q))],
    "instruction": [prompts({"instruction": Q, "input": ""}, Expected([], Q))],
    "input": [prompts({"input": Q}, Expected([], Q))],
}  # fmt: skip

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # Order, roles, texts of messages.
    ({"messages": [SAY, ASK]}, "answers", "role 'assistant' where 'user' was due"),
    ({"messages": [ASK, ASK2, SAY]}, "answers", "take turns"),
    ({"messages": [ASK, SAY, SAY2]}, "answers", "role 'assistant' where 'user' was due"),
    ({"messages": [ASK, RULE, SAY]}, "answers", "system messages come first"),
    ({"messages": [RULE]}, "answers", "no question"),
    ({"messages": [ASK]}, "answers", "no answer"),
    ({"messages": []}, "answers", "messages"),
    ({"messages": ["hi", "ho"]}, "answers", "no message"),
    ({"messages": "hi"}, "answers", "no list of messages"),
    ({"messages": [{"content": Q}]}, "answers", "no role"),
    ({"messages": [{"role": "user"}]}, "answers", "no text"),
    ({"messages": [USER | {"content": None}, SAY]}, "answers", "no text"),
    ({"messages": [USER | {"content": 3}, SAY]}, "answers", "no text"),
    ({"messages": [ASK, BOT | {"content": " "}]}, "answers", "empty"),
    ({"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}, SAY]}, "answers",
     "'image_url'"),
    ({"messages": [ASK, {"role": "teacher", "content": A}]}, "answers", "'teacher'"),
    ({"conversations": tagged(A, Q, tags=("gpt", "human"))}, "answers", "begins with a question"),
    ({"conversations": [*tagged(Q), {"from": "function_call", "value": "f()"}]}, "answers", "tool"),
    ({"conversations": [*tagged(Q), {"from": "observation", "value": "3"}]}, "answers", "tool"),
    ({"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "answers",
     "tool"),
    ({"messages": [ASK, SAY], "tools": [{"name": "f"}]}, "answers", "tools"),
    ({"messages": [ASK, SAY], "images": ["a.png"]}, "answers", "images"),
    # Two system texts, two forms.
    ({"messages": [RULE, ASK, SAY], "system": "Be kind."}, "answers", "two system texts"),
    ({"messages": [ASK, SAY], "prompt": Q2, "response": A2}, "answers",
     "messages (messages) and as prompt_response (prompt, response)"),
    ({"messages": [ASK, SAY], "conversations": tagged(Q2, A2)}, "answers", "different things"),
    ({"instruction": Q, "output": A, "answer": B}, "answers", "different things"),
    ({"prompt": Q, "instruction": Q2, "output": A}, "answers", "different things"),
    ({"prompt": Q, "instruction": Q2}, "prompts", "different things"),
    ({"messages": TALK2, "prompt": "else?"}, "prompts", "different things"),
    ({"text": A, "content": B}, "texts", "different things"),
    # What is learned.
    ({"messages": [ASK, SAY | {"weight": 0.5}]}, "answers", "only 0 and 1"),
    ({"messages": [ASK, SAY | {"weight": "0"}]}, "answers", "only 0 and 1"),
    ({"messages": [ASK, SAY | {"weight": 0}]}, "answers", "nothing is to be learned"),
    ({"messages": [ASK | {"weight": 1}, SAY]}, "answers", "question that is marked"),
    ({"messages": [ASK, SAY | {"weight": 0, "loss": True}]}, "answers", "against each other"),
    ({"messages": [ASK, SAY | {"train_detail": []}]}, "answers", "train_detail"),
    # Columns.
    ({"prompt": Q}, "answers", "no answer"),
    ({"prompt": Q, "response": " "}, "answers", "no answer"),
    ({"prompt": Q, "response": 3}, "answers", "no answer"),
    ({"prompt": Q, "response": [A]}, "answers", "no answer"),
    ({"response": A}, "answers", "no prompt"),
    ({"prompt": "", "response": A}, "answers", "no prompt"),
    ({"prompt": Q, "response": A, "history": [Q, A]}, "answers", "history"),
    ({"prompt": Q, "response": A, "history": "x"}, "answers", "history"),
    ({"prompt": Q, "response": A, "system": 3}, "answers", "no system text"),
    ({"prompt": TALK2, "response": A}, "answers", "ends with an answer"),
    ({"content": Q, "summary": A}, "answers", "content, summary"),
    ({}, "answers", "(none)"),
    ({"id": 3}, "pairs", "no chosen"),
    ({"text": A}, "answers", "no answer: the row has the columns text and is of the dialect text"),
    ({"instruction": Q, "output": A}, "texts", "is of the dialect alpaca, as sft"),
    ({"messages": [ASK, SAY]}, "pairs", "no pair: the row has the columns messages"),
    ({"prompt": Q, "response": A, "system": S, "system_prompt": "x"}, "answers",
     "two system texts"),
    # Pairs.
    ({"conversations": tagged(Q, A, Q2), "chosen": SAY, "rejected": SAY_B}, "answers",
     "the row is a pair"),
    ({"input": {"messages": [ASK], "tools": [{}]}, "preferred_output": [SAY],
      "non_preferred_output": [SAY_B]}, "pairs", "tools"),
    ({"input": Q, "preferred_output": [SAY], "non_preferred_output": [SAY_B]}, "pairs",
     "input holds no messages"),
    ({"prompt": Q, "chosen": A}, "pairs", "no rejected"),
    ({"prompt": Q, "chosen": A, "rejected": A}, "pairs", "the same"),
    ({"prompt": Q, "chosen": A, "rejected": 3}, "pairs", "rejected"),
    ({"chosen": A, "rejected": B}, "pairs", "no prompt"),
    ({"prompt": Q, "chosen": A, "rejected": B}, "answers", "columns: response=chosen"),
    ({"chosen": TALK2, "rejected": WORSE2}, "answers", "columns: messages=chosen"),
    ({"chosen": f"{HH} {A2}", "rejected": f"{HH} {B}"}, "answers", "columns: messages=chosen"),
    ({"prompt": [ASK], "chosen": [SAY], "rejected": [SAY_B]}, "answers",
     "columns: response=chosen"),
    ({"chosen": TALK2, "rejected": [ASK2, SAY_B]}, "pairs", "different conversations"),
    ({"prompt": "else?", "chosen": TALK2, "rejected": WORSE2}, "pairs", "no part"),
    ({"messages": [ASK2], "chosen": TALK2, "rejected": WORSE2}, "pairs", "no part"),
    ({"messages": TALK2, "chosen": A, "rejected": B}, "pairs", "ends with an answer"),
    ({"rejected_response": B}, "pairs", "better answer"),
    ({"instruction": Q, "output": A}, "pairs", "no rejected"),
    ({"prompt": Q, "answers": [{"answer": A, "score": 1}] * 2}, "pairs", "different scores"),
    ({"prompt": Q, "answers": {"text": [A]}}, "answers", "answers"),
    # Forms that are refused by name.
    ({"prompt": Q, "completion": A, "label": False}, "answers", "KTO"),
    ({"prompt": Q, "completion": A, "label": True}, "answers", "KTO"),
    ({"messages": [ASK, SAY], "kto_tag": True}, "answers", "KTO"),
    ({"prompt": Q, "completions": [A], "labels": [True]}, "answers", "stepwise"),
    ({"message_tree_id": "1", "tree_state": "ready", "prompt": {"text": Q, "replies": []}},
     "answers", "OpenAssistant"),
    ({"message_id": "1", "parent_id": None, "text": Q, "role": "prompter"}, "answers", "columns"),
    ({"message_id": "1", "parent_id": "0", "text": Q, "role": "prompter"}, "answers",
     "OpenAssistant"),
    ({"chat": {"turn_1": {"Human": Q, "Commands": "<|Commands|>: Search(\"x\")<eoc>", "MOSS": A}}},
     "answers", "tool"),
]  # fmt: skip

__all__ = ["REFUSED", "ROWS", "Case", "Expected"]
