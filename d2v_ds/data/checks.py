"""The names of everything that conversion, `d2v-shards verify` and the loader find in a corpus.

There is one list for all of them, so the numbers in `stats`, in TensorBoard and in the files of a
set have the same names. A test compares it with the table in docs/corpora.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

LEFT_OUT = {
    "unreadable": "the file is missing or cannot be opened",
    "format": "not in a format, or a variant of one, that can be read",
    "empty": "holds no content",
    "truncated": "ends before the length that its header states",
    "damaged": "cannot be decoded, or a checksum is wrong",
    "length": "its length contradicts the manifest, the index or its own header",
    "segment": "a part of a recording that lies outside of it",
    "silent": "a recording without sound",
    "not finite": "samples that are NaN or infinite",
    "range": "samples beyond every known full scale",
    "rate": "a sample rate that cannot be used",
    "channel": "lacks the channel that is asked for",
    "size": "too many pixels, bytes or ids",
    "too short": "shorter than the model needs",
    "encoding": "text that is not UTF-8",
    "row": "a line, row or group of members that does not describe a sample",
    "label": "a label that is neither text nor a number",
    "ids": "token ids that the tokenizer does not have",
    "link": "a link whose target is missing",
    "duplicate": "a second copy of the same input",
    "other": "any other reason",
}
"""Inputs that cannot be used: {name: meaning}. --max-bad limits their number."""

UNWANTED = {"min-seconds": "shorter than --min-seconds"}
"""Inputs that an option leaves out."""

PASSED_OVER = {
    "type": "no layout reads this type of file; counted by extension",
    "hidden": "the name begins with a dot",
    "linked twice": "a link to a file or folder that is read already",
    "shard set": "a folder with a shard set, such as OUT itself",
    "unused": "not part of any sample",
}
"""Files that are no inputs."""

ALTERED = {
    "length corrected": "the header states another length than was decoded",
    "scaled": "samples beyond -1 to 1 were scaled down",
    "clipped": "at least 1 % of its samples are cut off at full scale; it is used as it is",
    "one channel": "the channels cancel each other; one of them is used",
    "upright": "was rotated or mirrored as its EXIF orientation says",
    "depth": "reduced from more than 8 bits per pixel and channel",
    "first frame": "only the first picture of an animation or of several pages is used",
    "no metadata": "its text, label or other columns could not be read; kept without them",
    "cut": "a text that is too long for one document was cut into several",
    "duration": "the manifest states another duration than the file has",
}
"""Inputs that are used, but not as they are."""

OUTCOMES = {"left_out": "left out", "passed_over": "passed over", "altered": "altered"}
"""Entries of index.json with the number of findings of each kind: {entry: what was done}."""

LISTED = 8  # kinds in a line

KINDS = LEFT_OUT | UNWANTED | PASSED_OVER | ALTERED


class Finding(NamedTuple):
    """What was found about one file or sample."""

    name: str
    reason: str
    kind: str = "other"


class Note(NamedTuple):
    """What was altered to make a sample usable. kind: a name in ALTERED."""

    kind: str
    reason: str


class Unusable(ValueError):
    """The sample cannot be used. kind: a name in LEFT_OUT or UNWANTED. The message is the reason,
    without the file's name."""

    def __init__(self, kind: str, reason: str) -> None:
        assert kind in LEFT_OUT or kind in UNWANTED, kind
        super().__init__(reason)
        self.kind = kind

    def __reduce__(self) -> tuple[type[Unusable], tuple[str, str]]:
        return type(self), (self.kind, str(self))


def kind_of(error: BaseException) -> str:
    """The name in LEFT_OUT of what an exception reports."""
    if isinstance(error, Unusable):
        return error.kind
    return "unreadable" if isinstance(error, OSError) else "other"


def summary(about: Mapping[str, Any]) -> str:
    """What the conversion of a set found, in one line; "" if it found nothing. about: the set's
    index.json."""
    parts = [
        f"{sum(about[entry].values())} {what}{listed(about[entry])}"
        for entry, what in OUTCOMES.items()
        if about.get(entry)
    ]
    return f"conversion: {', '.join(parts)}" if parts else ""


def listed(numbers: Mapping[str, int]) -> str:
    """` (3 .aiff, 2 hidden)`; "" if there are none."""
    parts = [f"{number} {label}" for label, number in list(numbers.items())[:LISTED]]
    if len(numbers) > LISTED:
        parts.append(f"and {sum(numbers.values()) - sum(list(numbers.values())[:LISTED])} others")
    return f" ({', '.join(parts)})" if parts else ""
