"""d2v-shards text: table of layouts and options; packing.py turns documents into samples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_ds.errors import UserError
from shards.arguments import number
from shards.layout import AUTO, detect, find
from shards.several import open_sources
from shards.text.csv_rows import Csv
from shards.text.folder import Folder
from shards.text.jsonl import JsonLines
from shards.text.layout import TextLayout, TextOptions
from shards.text.parquet import Parquet
from shards.text.plain import PlainText
from shards.text.tsv import Tsv

if TYPE_CHECKING:
    from d2v_ds.data.checks import Finding
    from shards.family import Converter, Corpus

DESCRIPTION = (
    "Converts text to a shard set of token ids: concatenates the documents, each ended by eos, and "
    "cuts the result into blocks. With --label-key, every document, or pair, is a separate "
    "sample. An interrupted conversion resumes if the same command is run again."
)
# The first layout that recognises SOURCE is used. A folder uses the file formats of this table.
LAYOUTS: list[type[TextLayout]] = [PlainText, JsonLines, Csv, Tsv, Parquet, Folder]


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="MODEL",
        help="a sentencepiece model, for example from `d2v-shards tokenizer`, or a tokenizer.json "
        "of Hugging Face; copied into the set",
    )
    parser.add_argument(
        "--block",
        type=number(int, 2, 1_000_000),
        default=512,
        metavar="N",
        help="token ids per block (%(default)s)",
    )
    parser.add_argument(
        "--document",
        choices=("line", "blank-line", "file"),
        default="line",
        help="a document of plain text is a line, the text between blank lines, or a file "
        "(%(default)s)",
    )
    add_text_key(parser)
    parser.add_argument(
        "--label-key",
        default="",
        metavar="NAME",
        help="key or column of the label: makes one labelled sample per document, for probes and "
        "fine-tuning",
    )
    parser.add_argument(
        "--pair-key",
        default="",
        metavar="NAME",
        help="key of a second text, as in sentence pairs of GLUE; needs --label-key",
    )
    parser.add_argument(
        "--columns",
        type=lambda names: tuple(names.split(",")),
        default=(),
        metavar="NAME,NAME",
        help="names of all columns of a .tsv or .csv without a header line",
    )


def add_text_key(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="NAME",
        help="key or column of the text, except in plain text (%(default)s)",
    )


def read(arguments: argparse.Namespace) -> Corpus:
    """The corpus that the command line names. Raises UserError."""
    from shards.family import Corpus
    from shards.text.packing import LabelledText, PackedText
    from shards.text.tokenizer import Tokenizer

    model, sources, name = arguments.tokenizer, arguments.source, arguments.layout
    settings = TextOptions(
        arguments.document,
        arguments.text_key,
        arguments.label_key,
        arguments.pair_key,
        arguments.columns,
        arguments.split_by,
    )
    if settings.pair_key and not settings.label_key:
        raise UserError("--pair-key needs --label-key, which makes one sample per pair")
    layout = open_sources(LAYOUTS, name, sources, settings)
    tokenizer = Tokenizer.load(model)
    if remark := tokenizer.losses():
        print(f"{model}: {remark}")
    options: dict[str, Any] = {
        "tokenizer": f"{model.name} {tokenizer.sha256[:12]}",
        "document": settings.document,
        "text-key": settings.text_key,
    }
    # The layout decides how the same files are read. It is listed only if it is not the detected
    # one, so that sets of versions without --layout stay valid.
    if name != AUTO and any(
        detect(LAYOUTS, source) is not find(LAYOUTS, name, source) for source in sources
    ):
        options["layout"] = name
    converter: Converter
    more = {"splits": arguments.split, "file": tokenizer.file, "remark": remark}
    if settings.columns:
        options["columns"] = ",".join(settings.columns)
    if settings.label_key:
        options["label-key"] = settings.label_key
        if settings.pair_key:
            options["pair-key"] = settings.pair_key
        converter = LabelledText(layout, model, tokenizer.about(), settings.pair_key, **more)
    else:
        options["block"] = arguments.block
        converter = PackedText(layout, model, tokenizer.about(), arguments.block, **more)
    findings: list[Finding] = []
    samples = layout.samples(findings)
    return Corpus(samples, converter, options, findings=findings, divided=bool(arguments.split))
