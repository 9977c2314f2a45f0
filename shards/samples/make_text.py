"""Creates samples/text from WikiText-2: articles for training, and paragraphs labelled by topic.

    python -m shards.samples.make_text FOLDER [OUT]    # FOLDER: contains valid.txt and test.txt

WikiText-2 has no topics. Articles with a clear topic were labelled by hand, see below. The same
input gives the same files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

LIMIT = 1_200_000  # bytes, over all files
WORDS = 40  # at least, in a labelled paragraph
MOST = 300  # labelled paragraphs per file, about
EVERY = 8  # every 8th labelled paragraph of a training article goes to `seen`

# {topic: numbers of articles in their file, from 0}. The training data are all of valid.txt and the
# articles of test.txt without a topic; the other articles of test.txt are `unseen`.
TRAINED = {
    "nature": (0, 8, 14, 26, 55),
    "place": (2, 4, 5, 11, 13, 15, 20, 23, 27, 42, 44, 50),
    "music": (6, 9, 10, 33, 43, 53, 54),
    "screen": (18, 19, 30, 39, 40, 45, 48, 52, 56, 58, 59),
    "sport": (7, 12, 16, 32, 49, 51),
    "war": (1, 21, 22, 29, 34, 36, 38, 46),
}
UNSEEN = {
    "nature": (5, 11, 13, 23, 24, 41, 53),
    "place": (14, 40, 50, 51),
    "music": (2, 7, 22, 44),
    "screen": (0, 30, 33, 37, 42, 49, 54, 61),
    "sport": (4, 15, 16, 21, 26, 35, 45, 55),
    "war": (3, 6, 8, 20, 25, 31, 32, 48, 58, 59),
}
Paragraph = dict[str, str]


def articles(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(title, lines that are not blank) of each article."""
    title, lines = "", list[str]()
    for line in file.read_text(encoding="utf-8").split("\n"):
        heading = re.fullmatch(r" = ([^=].*) = ", line)
        if heading:
            if lines:
                yield title, lines
            title, lines = heading[1], []
        if line.strip():
            lines.append(line)
    yield title, lines


def topics(table: dict[str, tuple[int, ...]]) -> dict[int, str]:
    return {number: topic for topic, numbers in table.items() for number in numbers}


def is_paragraph(line: str) -> bool:
    return not line.startswith(" = ") and len(line.split()) >= WORDS


def make(source: Path, out: Path) -> int:
    """Writes train.txt.gz, labelled.jsonl, seen.jsonl and unseen.jsonl to `out`; returns the bytes
    of all files in it."""
    out.mkdir(parents=True, exist_ok=True)
    trained, held_out = topics(TRAINED), topics(UNSEEN)
    texts: list[str] = []
    probes: dict[str, list[Paragraph]] = {"labelled": [], "seen": [], "unseen": []}
    for number, (title, lines) in enumerate(articles(source / "valid.txt")):
        kept, labelled = [], 0
        for line in lines:
            if number in trained and is_paragraph(line):
                labelled += 1
                name = "seen" if labelled % EVERY == 0 else "labelled"
                row = {"text": line.strip(), "topic": trained[number], "article": title}
                probes[name].append(row)
                if name == "seen":
                    continue
            kept.append(line)
        texts.append("\n".join(kept) + "\n")
    for number, (title, lines) in enumerate(articles(source / "test.txt")):
        if number not in held_out:
            texts.append("\n".join(lines) + "\n")
            continue
        probes["unseen"] += [
            {"text": line.strip(), "topic": held_out[number], "article": title}
            for line in lines
            if is_paragraph(line)
        ]
    probes = {name: rows[:: max(1, len(rows) // MOST)] for name, rows in probes.items()}
    (out / "train.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode(), 9, mtime=0))
    for name, rows in probes.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return sum(file.stat().st_size for file in out.iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent / "text")
    arguments = parser.parse_args()
    size = make(arguments.source, arguments.out)
    assert size <= LIMIT, f"{size} bytes, the limit is {LIMIT}"
    print(f"{size} bytes in {arguments.out}")
