"""Says which public dialogues are fit to learn from, and brings their text into one form.

Owns the record of a dialogue, the limits of length and the topics left out. Knows no source.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_ANSWER = {"zh": 160, "en": 320}
MAX_QUESTION = {"zh": 80, "en": 200}
# ASCII, so that a Chinese letter ends an English word.
BLOCKED_EN = re.compile(
    r"\b(sex\w*|porn\w*|nud(e|es|ity)|naked|erotic|erect\w*|genital\w*|penis\w*|vagina\w*|breasts?"
    r"|boobs?|orgasm\w*|virgin\w*|prostitut\w*|whore|slut|rap(e|ed|ist)|lust\w*|copulat\w*|coitus"
    r"|intercourse|menstru\w*|condom\w*|horny|kinky|strip(per|pers)|gonorrh\w*|syphil\w*|chlamyd\w*"
    r"|hiv|aids|gay|lesbian|fuck\w*|shit\w*|bitch\w*|bastards?|damn\w*|asshole|ass|crap|piss\w*|dick"
    r"|cock|hell|wtf|nigg\w*|democra\w*|republic(an|ans)?|politic\w*|elect(ion|ions|oral)|trump"
    r"|obama|clinton|biden|president\w*|senat\w*|congress\w*|communis\w*|socialis\w*|nazi\w*|hitler"
    r"|fascis\w*|government\w*|abortion\w*|immigra\w*|terroris\w*|war|wars|parliament\w*|god|gods"
    r"|jesus|christ\w*|bible\w*|church\w*|pray\w*|religio\w*|faith|muslim\w*|islam\w*|jew|jews"
    r"|jewish|judaism|allah|quran|koran|catholic\w*|protestant\w*|mormon\w*|lds|byu|hindu\w*"
    r"|buddh\w*|saints?|priest\w*|divin\w*|heaven\w*|satan\w*|devil\w*|gospel|sin|sins|worship\w*"
    r"|suicid\w*|kill\w*|murder\w*|guns?|drunk|weed|marijuana|cocaine|heroin|opioid\w*|slave\w*)\b",
    re.IGNORECASE | re.ASCII,
)
BLOCKED_ZH = re.compile(
    "性交|性欲|性病|性爱|性功能|做爱|色情|淫|嫖|娼|妓|奸|裸|乳房|阴茎|阴道|勃起|早泄|梅毒|淋病|艾滋|交配|男女关系"
    "|床上|总统|主席|政府|政治|共产|民主|革命|选举|议会|反动|统治|战争|皇帝|君主|台湾|帝国|法轮|上帝|耶稣|基督"
    "|佛|菩萨|真主|伊斯兰|教堂|宗教|神灵|鬼|自杀|自尽|杀人|毒品|阿片|他妈|婊|混蛋"
)
ODD = re.compile(r"https?:|www\.|@|\S+\.(com|org|net)\b|[`<>{}|\\^~#*_=]|%\(|%[sd]|\ufffd|\d{5,}")


@dataclass(frozen=True)
class Dialogue:
    """Rounds of (paraphrases of the question, answer); `lang` is the language of the answers."""

    lang: str
    rounds: list[tuple[list[str], str]]


def tidy(text: str) -> str:
    """Returns the text in NFC on one line, without control characters and doubled spaces."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text))
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Co")).strip()


def acceptable(text: str, limit: int) -> bool:
    """Says whether a tidied text is short, plain and free of the topics left out."""
    if not text or len(text) > limit or not any(c.isalnum() for c in text):
        return False
    return not (ODD.search(text) or BLOCKED_EN.search(text) or BLOCKED_ZH.search(text))


def clean(dialogue: Dialogue) -> Dialogue | None:
    """Returns the dialogue up to its first unusable round, or None when nothing is left."""
    kept: list[tuple[list[str], str]] = []
    for questions, answer in dialogue.rounds:
        answer = tidy(answer)
        tidied = dict.fromkeys(tidy(question) for question in questions)
        usable = [q for q in tidied if acceptable(q, max(MAX_QUESTION.values()))]
        if not usable or not acceptable(answer, MAX_ANSWER[dialogue.lang]):
            break
        kept.append((usable, answer))
    return Dialogue(dialogue.lang, kept) if kept else None


def cleaned(dialogues: Iterable[Dialogue]) -> Iterator[Dialogue]:
    """Yields usable dialogues; a first question that an earlier one asks is taken out."""
    seen: set[str] = set()
    for raw in dialogues:
        dialogue = clean(raw)
        if dialogue is None:
            continue
        questions, answer = dialogue.rounds[0]
        fresh = [q for q in questions if q.casefold() not in seen]
        if fresh:
            seen.update(q.casefold() for q in fresh)
            yield Dialogue(dialogue.lang, [(fresh, answer), *dialogue.rounds[1:]])
