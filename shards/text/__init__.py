"""d2v-shards text: the options of the family, and the corpus that they describe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.arguments import number
from shards.text import sources

if TYPE_CHECKING:
    from shards.family import Corpus

DESCRIPTION = (
    f"Convert text ({sources.KINDS}) to a shard set of token ids: documents one after the "
    "other, each ended by eos, cut into blocks; with --label-key one sample a document. "
    "Interrupted or killed, the same command goes on."
)

SOURCE = f"a folder or a file: {sources.KINDS}"


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="MODEL",
        help="a sentencepiece model, as `d2v-shards tokenizer` makes them; goes into the set",
    )
    parser.add_argument(
        "--block", type=number(int, 2, 1_000_000), default=512, help="ids (%(default)s)"
    )
    parser.add_argument(
        "--document",
        choices=("line", "blank-line", "file"),
        default="line",
        help="what is a document in .txt: a line, what lies between empty lines, a file "
        "(%(default)s)",
    )
    sources.add_key_argument(parser)
    parser.add_argument(
        "--label-key",
        default="",
        metavar="NAME",
        help="of .jsonl and .parquet: labelled samples, one a document, for probes",
    )


def read(arguments: argparse.Namespace) -> Corpus:
    """Raises UserError."""
    from shards.family import Corpus
    from shards.text.packing import LabelledText, PackedText
    from shards.tokenizer import Tokenizer

    source = sources.TextSource.open(
        arguments.source, arguments.document, arguments.text_key, arguments.label_key
    )
    tokenizer = Tokenizer.load(arguments.tokenizer)
    options: dict[str, Any] = {
        "tokenizer": f"{arguments.tokenizer.name} {tokenizer.sha256[:12]}",
        "document": arguments.document,
        "text-key": arguments.text_key,
    }
    if arguments.label_key:
        options["label-key"] = arguments.label_key
        return Corpus(
            source.samples(), LabelledText(source, arguments.tokenizer, tokenizer.about()), options
        )
    options["block"] = arguments.block
    converter = PackedText(source, arguments.tokenizer, tokenizer.about(), arguments.block)
    return Corpus(source.samples(), converter, options)
