"""Splits of a corpus, such as train and test, as the names of its folders and files state them. The
words are those of the datasets library (https://huggingface.co/docs/datasets/repository_structure).
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from shards.family import Sample

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names, and the splits that they state."""

WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")


def stated_split(name: str) -> str:
    """The split that the name of a folder or file states as a separate word (val2017,
    training_set, data-train-00000.tar); "": none."""
    found = WORD.search(name.lower())
    return SPLITS[found[1]] if found else ""


def split_of_path(path: str) -> str:
    """The split that a file states in its name, or else the nearest folder that states one."""
    folder, _, name = path.rpartition("/")
    return stated_split(name) or _split_of_folder(folder)


@lru_cache(maxsize=65_536)
def _split_of_folder(path: str) -> str:
    return split_of_path(path) if path else ""


class StatedSplits:
    """Counts the inputs of each split among samples."""

    def __init__(self) -> None:
        self.inputs: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # {split: path of an input}

    def add(self, sample: Sample) -> None:
        """Counts a row of a table as an input, as index.json does."""
        for item in sample.inputs:
            split = split_of_path(item.path)
            self.inputs[split] += item.rows
            self.examples.setdefault(split, item.path)

    @property
    def remark(self) -> str:
        """A sentence, if there are several splits; else ""."""
        named = sorted(filter(None, self.inputs))
        if len(named) < 2:
            return ""
        counts = [f"{self.inputs[split]:,} {split}" for split in named]
        if self.inputs[""]:
            counts.append(f"{self.inputs['']:,} no split")
        example = _pattern(self.examples["train" if "train" in named else named[0]])
        return (
            f"the inputs belong to several splits ({', '.join(counts)}), which are not kept apart; "
            f"to convert only one, choose its files, for example with --only '{example}'"
        )


def _pattern(path: str) -> str:
    """A pattern for the files of the same split."""
    folder, _, name = path.rpartition("/")
    if found := WORD.search(name.lower()):
        return f"**/*{name[found.start() : found.end()]}*"
    while not (found := WORD.search(folder.rpartition("/")[2].lower())):
        folder = folder.rpartition("/")[0]
    above, slash, name = folder.rpartition("/")
    word = name[found.start() : found.end()]
    return f"{above}{slash}{name if name == word else f'*{word}*'}/**"
