"""d2v-shards speech: recordings -> samples of mono 16-bit FLAC.

The table of layouts and the options; converter.py makes the members of a sample, joining.py joins
short recordings into longer samples.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from d2v_ds.errors import UserError
from shards import arguments as types
from shards.several import Several, open_sources
from shards.speech.commonvoice import CommonVoice
from shards.speech.fairseq import Fairseq
from shards.speech.folder import Folder
from shards.speech.jsonl import JsonLines
from shards.speech.layout import SpeechLayout
from shards.speech.librispeech import LibriSpeech
from shards.speech.manifest import Manifest
from shards.speech.parquet import Parquet
from shards.speech.webdataset import WebDataset

if TYPE_CHECKING:
    from d2v_ds.data.checks import Finding
    from shards.family import Corpus

DESCRIPTION = (
    "Converts recordings (wav, flac, mp3, ogg, opus) to a shard set of mono 16-bit FLAC. "
    "An interrupted conversion resumes if the same command is run again."
)
# The first layout that recognises SOURCE is used, so general layouts come last.
LAYOUTS: list[type[SpeechLayout]] = [
    CommonVoice,
    WebDataset,
    Parquet,
    LibriSpeech,
    JsonLines,
    Fairseq,
    Manifest,
    Folder,
]


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--rate",
        type=types.number(int, 1000, 192_000),
        default=16000,
        metavar="HZ",
        help="sample rate of the set (%(default)s)",
    )
    parser.add_argument(
        "--channel",
        type=channel,
        default="mix",
        help="channel of multichannel recordings: mix (the mean), left, right or a number from 0 "
        "(%(default)s)",
    )
    parser.add_argument(
        "--max-seconds",
        type=types.number(float, 1, 86_400),
        metavar="S",
        help="divide longer recordings evenly into samples of at most S seconds",
    )
    parser.add_argument(
        "--min-seconds",
        type=types.number(float, 0, 3600),
        default=0.0,
        metavar="S",
        help="leave out recordings shorter than S seconds",
    )
    parser.add_argument(
        "--encode",
        choices=("flac", "keep"),
        default="flac",
        help="flac: store everything as mono 16-bit FLAC; keep: store mono wav and flac files that "
        "have the right rate unchanged (%(default)s)",
    )
    parser.add_argument(
        "--join",
        default="",
        metavar="COLUMN",
        help="join recordings with equal values in this column into longer samples, without gaps",
    )
    parser.add_argument(
        "--join-seconds",
        type=types.number(float, 0.1, 3600),
        default=8.0,
        metavar="S",
        help="approximate duration of a joined sample (%(default)s)",
    )


def channel(text: str) -> str:
    if text in ("mix", "left", "right") or (text.isdecimal() and int(text) < 64):
        return {"left": "0", "right": "1"}.get(text, text)
    raise argparse.ArgumentTypeError(f"{text}: expected mix, left, right or a number from 0 to 63")


def read(arguments: argparse.Namespace) -> Corpus:
    """The corpus that the command line names. Raises UserError."""
    from shards.family import Corpus
    from shards.speech import joining
    from shards.speech.converter import SpeechConverter

    if arguments.join and arguments.max_seconds:
        raise UserError("--join and --max-seconds cannot be combined; use one of them")
    layout = open_sources(LAYOUTS, arguments.layout, arguments.source, None)
    _refuse_columns_of_parquet(layout, arguments)
    converter = SpeechConverter(
        layout,
        arguments.rate,
        None if arguments.channel == "mix" else int(arguments.channel),
        arguments.max_seconds or 0.0,
        arguments.min_seconds,
        arguments.encode == "keep",
    )
    names = ("rate", "channel", "max_seconds", "min_seconds", "encode")
    options = {name.replace("_", "-"): getattr(arguments, name) for name in names}
    arrange = None
    if arguments.join:
        options |= {"join": arguments.join, "join-seconds": arguments.join_seconds}
        arrange = partial(
            joining.join,
            layout=layout,
            column=arguments.join,
            seconds=arguments.join_seconds,
            seed=arguments.seed,
        )
    findings: list[Finding] = []
    return Corpus(layout.samples(findings), converter, options, arrange, findings)


def _refuse_columns_of_parquet(layout: SpeechLayout, arguments: argparse.Namespace) -> None:
    """Raises UserError for options that need the columns of rows of Parquet, which are only read
    during the conversion."""
    layouts = [layout]
    if isinstance(layout, Several):
        layouts = [part.layout for part in layout.parts]
    for one in layouts:
        if not isinstance(one, Parquet):
            continue
        for name, column in (("--join", arguments.join), ("--split-by", arguments.split_by)):
            if column:
                raise UserError(
                    f"{name} {column}: {one.source} is Parquet, whose columns are only read during "
                    f"the conversion; convert it without {name}"
                )
