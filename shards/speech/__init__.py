"""Speech corpora -> samples of mono 16-bit FLAC. Options and the corpus; layouts.py reads folders
and manifests, converter.py makes the members of a sample, joining.py makes long ones of short."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from d2v_ds.errors import UserError
from shards import arguments as types

if TYPE_CHECKING:
    from shards.family import Corpus

DESCRIPTION = (
    "Convert recordings (wav, flac, mp3, ogg, opus) to a shard set of mono 16-bit FLAC. "
    "Interrupted or killed, the same command goes on."
)
SOURCE = (
    "a folder tree, a LibriSpeech or Libri-Light tree, a Common Voice folder or TSV, a fairseq "
    "manifest, a JSONL manifest, a TSV with a header line and a column `path`, or WebDataset tars"
)
LAYOUTS = (
    "auto",
    "folder",
    "librispeech",
    "commonvoice",
    "fairseq",
    "jsonl",
    "manifest",
    "webdataset",
)


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="auto",
        help="how SOURCE is laid out (%(default)s: recognised by what lies there)",
    )
    parser.add_argument(
        "--rate",
        type=types.number(int, 1000, 192_000),
        default=16000,
        help="frames a second (%(default)s)",
    )
    parser.add_argument(
        "--channel",
        type=channel,
        default="mix",
        help="of recordings with several: mix, left, right or a number from 0 (%(default)s)",
    )
    parser.add_argument(
        "--max-seconds",
        type=types.number(float, 1, 86_400),
        metavar="S",
        help="divide longer recordings evenly into samples of at most this",
    )
    parser.add_argument(
        "--min-seconds",
        type=types.number(float, 0, 3600),
        default=0.0,
        metavar="S",
        help="leave shorter recordings out",
    )
    parser.add_argument(
        "--encode",
        choices=("flac", "keep"),
        default="flac",
        help="flac: mono 16-bit FLAC throughout; keep: mono wav and flac of the right rate go "
        "through untouched (%(default)s)",
    )
    parser.add_argument(
        "--join",
        default="",
        metavar="COLUMN",
        help="join recordings that agree in this column into longer samples, without gaps",
    )
    parser.add_argument(
        "--join-seconds",
        type=types.number(float, 0.1, 3600),
        default=8.0,
        metavar="S",
        help="of a joined sample (%(default)s)",
    )


def channel(text: str) -> str:
    if text in ("mix", "left", "right") or (text.isdecimal() and int(text) < 64):
        return {"left": "0", "right": "1"}.get(text, text)
    raise argparse.ArgumentTypeError(f"{text}: expected mix, left, right or a number from 0 to 63")


def read(arguments: argparse.Namespace) -> Corpus:
    """The corpus that the command line names. Raises UserError."""
    from shards.family import Corpus
    from shards.speech import joining, layouts
    from shards.speech.converter import SpeechConverter

    if arguments.join and arguments.max_seconds:
        raise UserError("--join makes long samples and --max-seconds divides them; give one")
    layout = arguments.layout
    if layout == "auto":
        layout = layouts.recognise(arguments.source)
        print(f"{arguments.source}: layout {layout}")
    rejected: list[tuple[str, str]] = []
    root, samples = layouts.LAYOUTS[layout](arguments.source, rejected)
    converter = SpeechConverter(
        root,
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
            root=root,
            column=arguments.join,
            seconds=arguments.join_seconds,
            seed=arguments.seed,
        )
    return Corpus(samples, converter, options, arrange, rejected)
