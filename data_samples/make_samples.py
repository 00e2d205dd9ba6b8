"""Writes kinds/: a small data file of every kind that can be read, and of every mistake that is found.

    python data_samples/make_samples.py

Half of the questions are English, half Chinese; all were written for this. Token files hold bytes under the World
vocabulary's ids (byte b is id b + 1), so that the tiny base and the released models both read them.
"""

from __future__ import annotations

import csv
import io
import json
import struct
from pathlib import Path

import numpy as np

KINDS = Path(__file__).resolve().parent / "kinds"
PAIRS = [
    ("Which planet is the largest?", "Jupiter."), ("海水为什么是咸的?", "因为里面溶有盐。"),
    ("What do bees make?", "They make honey and wax."), ("一年有几个季节?", "四个:春、夏、秋、冬。"),
    ("How many legs has a spider?", "Eight."), ("水在多少度结冰?", "在零摄氏度。"),
    ("Name a word that rhymes with cat.", "Hat."), ("熊猫爱吃什么?", "竹子。"),
]
STORY = ("The lamp on the pier goes on at dusk. A boat turns towards it, and the gulls make room.\n"
         "黄昏时,码头上的灯亮了。一只小船朝它驶来,海鸥让开了路。\n")
CHAT = "User: {}\n\nAssistant: {}"


def tokens(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()] + [0]


def chat(*turns: str, system: str = "") -> dict:
    """A row of messages: user and assistant in turn."""
    roles = ["user", "assistant"] * len(turns)
    rows = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + rows}


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def binidx(name: str, documents: list[list[int]], dtype: str, code: int) -> dict[str, bytes]:
    """A pair as json2binidx_tool lays it out."""
    n, size = len(documents), np.dtype(dtype).itemsize
    sizes = [len(document) for document in documents]
    places = [sum(sizes[:i]) * size for i in range(n)]
    index = struct.pack(f"<9sQBQQ{n}i{n}q{n + 1}q", b"MMIDIDX\0\0", 1, code, n, n + 1, *sizes, *places, *range(n + 1))
    return {f"{name}.bin": np.concatenate(documents).astype(dtype).tobytes(), f"{name}.idx": index}


def npy(array: list) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(array, dtype="<u2"))
    return file.getvalue()


def table(rows: list[dict]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def good() -> dict[str, bytes]:
    """Each kind as it should be, by file name."""
    documents = [tokens(CHAT.format(*pair)) for pair in PAIRS]
    sft = [{"query": q, "response": a} for q, a in PAIRS]
    clock = {"name": "clock", "description": "tells the time in a city", "parameters": {"city": "string"}}
    tools = [{"tools": [clock], "messages": [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "", "reasoning_content": thought,
         "tool_calls": [{"function": {"name": "clock", "arguments": {"city": city}}}]},
        {"role": "tool", "content": "18:40"}, {"role": "assistant", "content": answer}]}
        for asked, thought, city, answer in (
            ("What time is it in Bern?", "I need the clock.", "Bern", "It is 18:40 in Bern."),
            ("昆明现在几点?", "需要查时间。", "昆明", "昆明现在是 18:40。"))]
    return {
        "text.jsonl": jsonl([{"text": CHAT.format(*pair)} for pair in PAIRS]),
        "messages.jsonl": jsonl([chat(*PAIRS[i], *PAIRS[i + 2], system="Answer in a few words. 请简短回答。")
                                 for i in range(0, 6, 2)]),
        "thinking_and_tools.jsonl": jsonl(tools),
        "instruction.jsonl": jsonl([{"instruction": "Say it in the other language. 翻译成另一种语言。", "input": a,
                                     "output": b} for a, b in (("snow", "雪"), ("火车", "train"), ("tea", "茶"))]),
        "prompt.jsonl": jsonl([{"prompt": q, "completion": a} for q, a in PAIRS]),
        "sft.json": json.dumps(sft, ensure_ascii=False, indent=1).encode(), "sft.csv": table(sft),
        "story.txt": STORY.encode(), "story_utf16le.txt": STORY.encode("utf-16-le"),
        "stream.npy": npy(sum(documents, [])), "rows.npy": npy([row[:40] for row in documents if len(row) >= 40]),
        "stream_uint16.bin": np.array(sum(documents, []), dtype="<u2").tobytes(),
        **binidx("pair", documents, "<u2", 8), **binidx("pair_int32", documents, "<i4", 4),
    }


def bad() -> dict[str, bytes]:
    """Each mistake, by file name."""
    pair = binidx("bad_cut", [tokens(CHAT.format(*p)) for p in PAIRS], "<u2", 8)
    line = json.dumps({"text": CHAT.format(*PAIRS[1])}, ensure_ascii=False)
    return {
        "bad_quotes.jsonl": (line.replace('"', "'") + "\n" + line.replace('"', "“") + "\n" + line[:-1] + "\n").encode(),
        "bad_fields.jsonl": jsonl([{"question": q, "answer": a} for q, a in PAIRS[:2]]),
        "bad_empty.jsonl": jsonl([{"text": ""}, {"prompt": "你好", "completion": " "}]),
        "bad_gbk.jsonl": (line + "\n").encode("gbk"), "bad_utf16.jsonl": (line + "\n").encode("utf-16"),
        "bad_gbk.txt": STORY.encode("gbk"),
        "bad_turns.jsonl": jsonl([chat("Hello?", "Hi.", "你在吗?") | {"messages": chat("你在吗?")["messages"] * 2},
                                  {"text": "User: Hello?\n\nUser: 在吗?\n\nAssistant: Yes."}]),
        "bad_untrained.jsonl": jsonl([{"text": f"User: {q}"} for q, _ in PAIRS[:2]]),
        "bad_vocabulary.npy": npy([300, 70, 0]),
        "bad_cut.bin": pair["bad_cut.bin"][:-100], "bad_cut.idx": pair["bad_cut.idx"],
    }


def main() -> None:
    KINDS.mkdir(exist_ok=True)
    for name, data in (good() | bad()).items():
        (KINDS / name).write_bytes(data)
        print(f"{name}: {len(data)} bytes")


if __name__ == "__main__":
    main()
