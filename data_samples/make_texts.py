"""Writes the text of the quickstart, all of it from words.toml, prose.txt and the sentences below.

    python data_samples/make_texts.py        # writes the three jsonl files beside it

base_text    endless text for the tiny base: biographies, records, stories, chats, some Chinese, prose
person_task  the fine-tuning task: a sentence about a person in, a line of JSON out
"""

from __future__ import annotations

import itertools
import json
import random
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
_FILE = tomllib.loads((HERE / "words.toml").read_text(encoding="utf-8"))
WORDS = {kind: text.split() for kind, text in _FILE["words"].items()}
HELD = {kind: text.split() for kind, text in _FILE["held"].items()}
TEMPLATES = _FILE["templates"]
SHARES = {"people": 25, "records": 24, "stories": 20, "chats": 11, "chinese": 18, "prose": 2}  # of 100 documents

ONSETS = ("", *"bdfghjklmnprstvwxz", "br", "dr", "gr", "kl", "st", "tr", "sh", "ch", "qu")

# The 3755 common characters of GB 2312, for Chinese names and words; the held-out ones are taken out.
COMMON = [c for row in range(0xB0, 0xD8) for col in range(0xA1, 0xFF)
          if (c := bytes([row, col]).decode("gb2312", "ignore")) and c not in HELD["given"] + HELD["surname"]]


def made_up_word(rng: random.Random, low=2, high=3) -> str:
    """A pronounceable word, never a held-out one: copying it takes reading it, not knowing it."""
    while True:
        syllables = [rng.choice(ONSETS) + rng.choice("aeiouaeiouy") for _ in range(rng.randint(low, high))]
        word = "".join(syllables) + rng.choice(("", "", "n", "r", "s", "l", "m", "t", "ck", "th", "nd"))
        if word.capitalize() not in HELD["first"] + HELD["last"] + HELD["city"]:
            return word


def invented(rng: random.Random, words: list[str]) -> str:
    """A proper name that is on no list: syllables, or the head of one word and the tail of another, often misspelt."""
    if rng.random() < 0.4:
        return made_up_word(rng).capitalize()
    while True:
        head, tail = rng.sample(words, 2)
        word = head[:rng.randint(1, len(head))] + tail[rng.randrange(len(tail)):].lower()
        if rng.random() < 0.5:
            i = rng.randrange(len(word))
            word = word[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[i + rng.randint(0, 1):]
        word = word.capitalize()
        if 3 <= len(word) <= 12 and word not in HELD["first"] + HELD["last"] + HELD["city"]:
            return word


def english_name(rng: random.Random, words=WORDS, made_up=0.6) -> tuple[str, str]:
    """(first, last), a share of them invented."""
    first, last = (invented(rng, words[kind]) if rng.random() < made_up else rng.choice(words[kind])
                   for kind in ("first", "last"))
    return first, last


def chinese_name(rng: random.Random, surnames=WORDS["surname"], given=COMMON) -> str:
    return rng.choice(surnames) + "".join(rng.choice(given) for _ in range(rng.choice((1, 2, 2))))


def city(rng: random.Random, kind: str, words=WORDS, made_up=0.5) -> str:
    """A real city, or a made-up town; kind is "city" (English) or "zcity" (Chinese)."""
    if rng.random() >= made_up:
        return rng.choice(words[kind])
    return invented(rng, words[kind]) if kind == "city" else rng.choice(COMMON) + rng.choice(COMMON)


class Facts(dict):
    """The words of one document: facts["thing1"] is drawn on first use and stays."""

    def __init__(self, rng: random.Random):
        super().__init__()
        self.rng = rng

    def __missing__(self, slot: str) -> str:
        kind, number = re.fullmatch(r"([A-Za-z]+)(\d*)", slot).groups()
        rng = self.rng
        if kind in ("name", "first", "last"):
            first, last = english_name(rng)
            self.update({f"name{number}": f"{first} {last}", f"first{number}": first, f"last{number}": last})
        elif kind in ("he", "He", "his", "His"):
            she = rng.random() < 0.5
            self.update({f"he{number}": "she" if she else "he", f"his{number}": "her" if she else "his",
                         f"He{number}": "She" if she else "He", f"His{number}": "Her" if she else "His"})
        else:
            drawn = (self._word(kind) for _ in range(50))
            self[slot] = next((word for word in drawn if word not in self.values()), None) or self._word(kind)
        return self[slot]

    def _word(self, kind: str) -> str:
        rng = self.rng
        if kind == "age":
            return str(rng.randint(1, 99))
        if kind == "number":
            return str(rng.randint(0, 10 ** rng.randint(1, 5)))
        if kind == "hour":
            return f"{rng.randint(1, 23)}:{rng.randint(0, 59):02d}"
        if kind == "price":
            return f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}"
        if kind == "code":
            return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ0123456789abcdefghijkmnopqrstuvwxyz-_/+")
                           for _ in range(rng.randint(3, 8)))
        if kind == "word":
            return made_up_word(rng, 1, 4)
        if kind == "zword":
            return "".join(rng.choice(COMMON) for _ in range(rng.randint(1, 4)))
        if kind == "zname":
            return chinese_name(rng)
        if kind in ("city", "zcity"):
            return city(rng, kind)
        return rng.choice(WORDS[kind])


def fill(template: str, facts: Facts) -> str:
    """Choose among (a|b|c), then put words into the {slots}."""
    text = re.sub(r"\(([^()]*\|[^()]*)\)", lambda m: facts.rng.choice(m[1].split("|")), template)
    return re.sub(r"\{([A-Za-z]+\d*)\}", lambda m: facts[m[1]], text)


def prose(held_out: bool) -> list[str]:
    """Paragraphs of prose.txt; every eighth is kept for the held-out text."""
    paragraphs = [p.strip() for p in (HERE / "prose.txt").read_text(encoding="utf-8").split("\n\n") if p.strip()]
    return [p for i, p in enumerate(paragraphs) if (i % 8 == 7) == held_out]


def base_text(seed: int, *, held_out: bool = False) -> Iterator[str]:
    """Endless documents of general text, the same for the same seed."""
    rng = random.Random(seed)
    paragraphs = prose(held_out)
    while True:
        kind = rng.choices(list(SHARES), SHARES.values())[0]
        if kind == "prose":
            yield rng.choice(paragraphs)
        else:
            yield fill(rng.choice(TEMPLATES[kind]), Facts(rng))


def repeats(seed: int) -> Iterator[tuple[str, int]]:
    """Endless (text, start): a few random items listed twice or more; from character `start` on all can be known.

    Trained first, and from there on alone, these teach the base to copy within minutes. Without them it learns the
    words' order for a long time before it learns to look back.
    """
    rng = random.Random(seed)
    while True:
        kinds = rng.choices(("word", "name", "city", "number", "code", "zword", "zname"), (5, 5, 2, 2, 2, 3, 2), k=4)
        items = [Facts(rng)[kind + "1"] for kind in kinds[:rng.randint(1, 4)]]
        texts = []
        for _ in range(rng.choice((2, 2, 3))):
            left, right = rng.choice((("", ""), ("", ""), '""', "()", "[]", "“”", (":", ""), ("=", "")))
            separator = rng.choice((", ", "; ", " | ", "\n", " "))
            texts.append(separator.join(left + item + right for item in items))
        between = rng.choice(("\n", "\n\n", " / ", ". "))
        yield between.join(texts), len(texts[0] + between)


# ---- the fine-tuning task ----

ASKED = {
    "en": ["{name} lives in {city} and is {age} years old.", "{name}, {age}, lives in {city}.",
           "At {age}, {name} still lives in {city}.", "In {city} you can meet {name}, who is {age}.",
           "{name} is {age} years old. Home is {city}.", "My neighbour here in {city} is called {name} and is {age}.",
           "Please note: {name} from {city}, age {age}.", "I am {name}, {age} years old, and I live in {city}.",
           "{city} is where {name} lives, now aged {age}.", "The {age}-year-old {name} has moved to {city}."],
    "zh": ["{name}住在{city}，今年{age}岁。", "今年{age}岁的{name}住在{city}。", "我叫{name}，{age}岁，家在{city}。",
           "{city}的{name}今年{age}岁了。"],
}


def example(language: str, name: str, town: str, age: int, rng: random.Random) -> str:
    """One chat document: the sentence, and the answer as JSON."""
    sentence = rng.choice(ASKED[language]).format(name=name, city=town, age=age)
    answer = json.dumps({"name": name, "city": town, "age": age}, ensure_ascii=False)
    return f"User: {sentence}\n\nAssistant: {answer}"


def person_task(seed: int, n_train: int, n_heldout: int, chinese: float = 0.25) -> tuple[list[str], list[str]]:
    """(train, held-out) documents. No name occurs in both; half of the held-out names are made of parts that
    neither the base nor the training documents ever contained."""
    rng = random.Random(seed)
    seen, made = set(), []
    for i in range(n_train + n_heldout):
        words, made_up = (HELD, 0.0) if i >= n_train and i % 2 == 0 else (WORDS, 0.5)
        language = "zh" if rng.random() < chinese else "en"
        while True:
            if language == "zh":
                name = chinese_name(rng, words["surname"], words.get("given", COMMON))
            else:
                name = " ".join(english_name(rng, words, made_up))
            if name not in seen:
                break
        seen.add(name)
        town = city(rng, "city" if language == "en" else "zcity", words, made_up)
        made.append(example(language, name, town, rng.randint(18, 89), rng))
    return made[:n_train], made[n_train:]


def quickstart() -> tuple[list[str], list[str]]:
    """(train, held-out) as they are committed. A quarter of the training documents is text of the base's own kind:
    who practises one thing alone forgets the others."""
    train, heldout = person_task(seed=7, n_train=5000, n_heldout=200)
    train += itertools.islice(base_text(1_000_000_007), 1500)
    random.Random(7).shuffle(train)
    return train, heldout


def general(n: int = 300) -> list[str]:
    """Held-out text of the base's own kind, as it is committed."""
    return list(itertools.islice(base_text(2_000_000_011, held_out=True), n))


def choices(heldout: list[str], n: int = 60) -> list[dict]:
    """Multiple-choice questions, as they are committed: each wrong answer has one field of somebody else's."""
    rng, people = random.Random(7), []
    for text in heldout[:n]:
        sentence, _, answer = text.partition("\n\nAssistant: ")
        people.append((sentence.removeprefix("User: "), json.loads(answer)))
    rows = []
    for sentence, person in people:
        others = [{**person, key: next(p[key] for _, p in rng.sample(people, n) if p[key] != person[key])}
                  for key in person]
        answers = [json.dumps(p, ensure_ascii=False) for p in rng.sample([person, *others], 4)]
        rows.append({"question": sentence, "choices": answers,
                     "answer": answers.index(json.dumps(person, ensure_ascii=False))})
    return rows


def write_jsonl(path: Path, documents: list[str] | list[dict]) -> None:
    rows = (text if isinstance(text, dict) else {"text": text} for text in documents)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path.name}: {len(documents)} documents, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    train, heldout = quickstart()
    write_jsonl(HERE / "quickstart_train.jsonl", train)
    write_jsonl(HERE / "quickstart_heldout.jsonl", heldout)
    write_jsonl(HERE / "quickstart_choices.jsonl", choices(heldout))
    write_jsonl(HERE / "general_heldout.jsonl", general())


if __name__ == "__main__":
    main()
