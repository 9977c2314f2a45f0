"""Trees of LibriSpeech and Libri-Light.

SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac, with SPEAKER-CHAPTER.trans.txt in the same
folder: one line `SPEAKER-CHAPTER-UTTERANCE TEXT` per recording (https://www.openslr.org/12)
SIZE/SPEAKER/BOOK/NAME.flac, with NAME.json in the same folder, which has a key "speaker"
(https://github.com/facebookresearch/libri-light/blob/main/data_preparation/README.md)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.findings import of_error
from shards.keys import make_key
from shards.speech.layout import AUDIO, SpeechLayout
from shards.walking import NOT_READ, check_file, extension_of, first_folder, walk

TRANSCRIPTS = ".trans.txt"
SPACE = " \t\r"
LONGEST = 1 << 24  # bytes of a file of transcripts or metadata
TRIED = 8  # JSON files that are read to recognise the layout, because some may be damaged
KEPT = ("speaker", "snr")  # of the JSON of Libri-Light, which is long


class LibriSpeech(SpeechLayout):
    name = "librispeech"
    help = "LibriSpeech or Libri-Light tree, or a part of one"
    takes = "folder"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        """By the first folder that contains recordings."""
        if not source.is_dir():
            return False
        folder, names = first_folder(source, AUDIO)
        if any(name.endswith(TRANSCRIPTS) for name in names):
            return True
        stems = {os.path.splitext(n)[0] for n in names if n.lower().endswith(AUDIO)}
        described = [name for name in names if name.endswith(".json") and name[:-5] in stems]
        return any("speaker" in _description(folder / name, []) for name in described[:TRIED])

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        number = 0
        for below, group in groupby(walk(self.root, findings), lambda f: os.path.dirname(f.path)):
            folder, files = self.root / below, list(group)
            names = [file.name for file in files]
            texts, reported = _transcripts(folder, names, self.root, findings)
            has_texts = any(name.endswith(TRANSCRIPTS) for name in names)
            for path, name, size, _ in files:
                stem = os.path.splitext(name)[0]
                if extension_of(name) not in AUDIO:
                    if not _is_metadata(name, names):
                        findings.append(Finding(path, NOT_READ, "type"))
                    continue
                number += 1
                reasons: list[str] = []
                columns = _columns(folder, stem, names, reasons)
                if stem in texts:
                    columns["text"] = texts.pop(stem)
                elif has_texts and stem not in reported:
                    reasons.append("has no line in the transcripts of its folder; it gets no text")
                findings += (Finding(path, reason, "no metadata") for reason in reasons)
                key = make_key(os.path.splitext(path)[0])
                yield Sample(key, (Input(path),), columns, size)
            for stem in texts:
                where = os.path.join(below, stem)
                findings.append(Finding(where, "has a transcript but no recording", "unreadable"))
        if not number:
            raise UserError(f"{self.root}: contains no {', '.join(AUDIO)} file")


def _is_metadata(name: str, names: list[str]) -> bool:
    """Whether a file belongs to recordings of its folder: transcripts, or the JSON of one."""
    stem, extension = os.path.splitext(name)
    return name.endswith(TRANSCRIPTS) or (
        extension == ".json" and any(stem + audio in names for audio in AUDIO)
    )


def _transcripts(
    folder: Path, names: list[str], root: Path, findings: list[Finding]
) -> tuple[dict[str, str], set[str]]:
    """({stem of a recording: text} of a folder, stems whose text is reported as not usable)."""
    texts: dict[str, str] = {}
    unclear: set[str] = set()
    reported: set[str] = set()
    for name in names:
        if not name.endswith(TRANSCRIPTS):
            continue
        where = os.path.relpath(folder / name, root)
        # Not splitlines, which also ends lines at U+2028 and other characters within a text.
        try:
            lines = _content(folder / name).decode("utf-8-sig", "replace").split("\n")
        except (ValueError, OSError) as error:
            reason = f"cannot be read ({of_error('', error).reason}); its recordings get no text"
            findings.append(Finding(where, reason, "no metadata"))
            continue
        for number, line in enumerate(lines, start=1):
            stem, _, text = line.strip(SPACE).partition(" ")
            text = text.strip(SPACE)
            if not stem:
                continue
            reason = ""
            if "\ufffd" in text or not text:
                reported.add(stem)
                reason = "is not `NAME TEXT` in UTF-8; its recording gets no text"
            elif texts.setdefault(stem, text) != text:
                reason = f"gives {stem} another text than an earlier line; it gets no text"
                unclear.add(stem)
            if reason:
                findings.append(Finding(f"{where}, line {number}", reason, "no metadata"))
    return {stem: text for stem, text in texts.items() if stem not in unclear}, unclear | reported


def _content(path: Path) -> bytes:
    """Raises OSError, and Unusable for what is no file or too large."""
    check_file(path)
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise Unusable("size", f"is larger than {LONGEST:,} bytes")
    return data


def _columns(folder: Path, stem: str, names: list[str], reasons: list[str]) -> dict[str, object]:
    ids = stem.split("-")
    if len(ids) == 3 and all(part.isdigit() for part in ids):
        return {"speaker": ids[0], "chapter": ids[1]}
    if f"{stem}.json" in names:
        about = _description(folder / f"{stem}.json", reasons)
        return {name: about[name] for name in KEPT if name in about}
    return {}


def _description(path: Path, reasons: list[str]) -> dict[str, object]:
    """The JSON of a recording; {} if it cannot be read, with the reason in `reasons`."""
    try:
        about = json.loads(_content(path))
        if isinstance(about, dict):
            return about
        reason = "is not an object"
    except (OSError, ValueError, RecursionError) as error:
        reason = f"cannot be read ({error})"
    reasons.append(f"{path.name} {reason}; the recording is kept without it")
    return {}
