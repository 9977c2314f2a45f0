"""The base class of all speech layouts, which depend on no option, and the types of recordings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.data.containers import FFMPEG
from shards.layout import Layout
from shards.walking import extension_of, first_folder, walk, wanted

# Extensions of what libsndfile reads. Raw samples have no header; .mat, .mpc, .iff and .htk files
# usually hold something else.
USUAL = (".wav", ".flac", ".mp3", ".ogg", ".opus")
RARE = (
    *(".oga", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".bwf", ".wave"),
    *(".sph", ".nist", ".voc", ".mp2", ".mp1", ".sf", ".ircam", ".avr", ".paf", ".pvf", ".svx"),
    *(".8svx", ".16svx", ".sds", ".wve"),
)
AUDIO = (*USUAL, *RARE)
FOREIGN = (  # recordings that libsndfile does not read
    *(".m4a", ".m4b", ".mp4", ".aac", ".webm", ".mkv", ".mka", ".mov", ".wma", ".amr", ".3gp"),
    *(".ape", ".wv", ".shn", ".ac3", ".spx"),
)

SpeechLayout = Layout[None, bytes]  # an item holds an encoded recording


def is_packed(source: Path, extension: str) -> bool:
    """Whether SOURCE is a file with this extension, or a folder whose first folder with such files
    or recordings contains no recordings beside them."""
    if source.is_file():
        return extension_of(source.name) == extension
    extensions = set(map(extension_of, first_folder(source, (*AUDIO, extension))[1]))
    return extension in extensions and extensions.isdisjoint(AUDIO)


def packed_files(source: Path, extension: str, findings: list[Finding]) -> Iterator[str]:
    """SOURCE, or the files with this extension below it, relative to the root of the layout.
    Raises UserError if there are none."""
    if source.is_file():
        yield source.name
        return
    found = walk(source, findings)
    files = wanted(source, found, lambda n: extension_of(n) == extension, extension, findings)
    yield from (file.path for file in files)


def advised(findings: Iterable[Finding]) -> list[Finding]:
    """Findings about files that were passed over; of recordings, with what to do."""
    reason = f"is a recording of a type that libsndfile does not read; {FFMPEG}"
    return [
        found._replace(reason=reason) if extension_of(found.name) in FOREIGN else found
        for found in findings
    ]
