"""D5: rows with a part changed to anything are read as texts, or refused by name: never a crash."""

import copy
import random
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="training is the package's")
from dialect_rows import REFUSED, ROWS

from chatglm.data.dialects import read_answers, read_pairs, read_prompts, read_texts
from chatglm.data.records import Columns, Record, RowProblem
from chatglm.data.registry import DIALECTS

READERS = (read_answers, read_pairs, read_prompts, read_texts)
EXAMPLES = [
    *(case.row for cases in ROWS.values() for case in cases),
    *(row for row, _, _ in REFUSED),
    *(dialect.example for dialect in DIALECTS),
]
VALUES: tuple[Any, ...] = (
    *(None, "", " ", "x", "[", "{}", "[1]", "\n\nHuman: a\n\nAssistant: b", 0, 1, 0.5, True),
    *([], {}, [None], ["x"], ["x", "y"], [["x", "y"]], [[]], {"role": "user"}, float("nan")),
    *([{"role": "user", "content": "x"}], {"from": "gpt", "value": "x"}, [{"role": 3}], b"x"),
    *([{"score": 1, "answer": "x"}], {"role": [], "content": []}, {"turn_1": {"Human": 3}}),
)
TOLD = (
    *({},) * 8,
    {"learn_turns": "all"},
    {"prompt": "input"},
    {"messages": "conversations", "role_tag": "from", "user_tag": "gpt"},
    {"chosen": "response", "rejected": "answer"},
)


def list_places(value: Any) -> list[tuple[Any, Any]]:
    """Return the containers in a value, each with every key of it."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    places = [(value, key) for key in keys]
    for item in value.values() if isinstance(value, dict) else value:
        places += list_places(item) if isinstance(item, (dict, list)) else []
    return places


def mutate(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return a row with some of its parts changed, taken out, or put under another name."""
    made = copy.deepcopy(row)
    names = [key for example in EXAMPLES for key in example]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list_places(made)
        if not places or rng.random() < 0.2:
            made[rng.choice(names)] = copy.deepcopy(rng.choice(VALUES))
            continue
        container, key = rng.choice(places)
        if isinstance(container, dict) and rng.random() < 0.3:
            container[rng.choice(names)] = container.pop(key)
        elif isinstance(container, list) and rng.random() < 0.3:
            container.insert(key, copy.deepcopy(rng.choice(container)))
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return made


def holds_texts(record: Record) -> bool:
    """Say whether a record is what trainings rely on."""
    query, rounds = record.frame()
    texts = [*record[2:], query, *(text for pair in rounds for text in pair)]
    return all(isinstance(text, str) for text in texts) and bool(record.query.strip())


def test_every_mutation_is_read_or_refused() -> None:
    rng = random.Random(5)
    read = refused = 0
    for number in range(2000):
        row = mutate(EXAMPLES[number % len(EXAMPLES)], rng)
        told = dict(rng.choice(TOLD))
        if rng.random() < 0.05:
            told["dialect"] = rng.choice(DIALECTS).name
        before = copy.deepcopy(row)
        for reader in READERS:
            try:
                records = list(reader(row, Columns(**told)))
            except RowProblem as problem:
                refused += 1
                assert len(str(problem)) < 700 and "\n" not in str(problem), str(problem)
                continue
            read += 1
            assert records and all(map(holds_texts, records)), (row, told, records)
        assert repr(row) == repr(before)
    assert read > 400 and refused > 400


@pytest.mark.parametrize("empty", [None, "", [], {}, "  "], ids=repr)
def test_empty_columns_of_other_dialects_and_any_order_change_nothing(empty: Any) -> None:
    """Tables of several kinds of rows have all columns, and most of them are empty in each row."""
    rng = random.Random(6)
    keys = sorted({key for dialect in DIALECTS for key in dialect.known})
    for case in (case for cases in ROWS.values() for case in cases):
        row = {**dict.fromkeys([*keys, "tools", "images", "label", "id"], empty), **case.row}
        items = list(row.items())
        rng.shuffle(items)
        reader = READERS[("answers", "pairs", "prompts", "texts").index(case.aim)]
        found = [r._replace(dialect="") for r in reader(dict(items), Columns())]
        assert [tuple(r[1:7]) for r in found] == [tuple(record) for record in case.records], items
