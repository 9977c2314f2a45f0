"""d2v-shards tokenizer: trains a sentencepiece model on the documents of a corpus."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from d2v_ds.exit_codes import FINISHED
from d2v_ds.files import write_atomically
from shards.arguments import add_chosen, add_sources, number
from shards.choosing import Chooser
from shards.encoding import check_text
from shards.family import Sample
from shards.findings import of_error, report_of
from shards.layout import AUTO
from shards.links import once
from shards.several import open_sources
from shards.text import LAYOUTS, add_text_key
from shards.text.layout import TextLayout, TextOptions

DESCRIPTION = (
    "Trains a sentencepiece model on a random sample of the sentences of text files: unigram (slow "
    "to train, fast to use) or bpe, with byte fallback. Ids: 0 bos, 1 pad, 2 eos, 3 unk, then the "
    "pieces; the last id is the mask."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sources(parser, "a text file or a folder, as for `d2v-shards text`; can be several")
    parser.add_argument("out", type=Path, metavar="OUT", help="the model file to write, NAME.model")
    parser.add_argument(
        "--vocab-size",
        type=number(int, 262, 1_000_000),
        default=32_000,
        metavar="N",
        help="number of ids, including the mask (%(default)s)",
    )
    parser.add_argument(
        "--model",
        choices=("unigram", "bpe"),
        default="unigram",
        help="type of the model (%(default)s)",
    )
    parser.add_argument(
        "--sentences",
        type=number(int, 1, 100_000_000),
        default=300_000,
        metavar="N",
        help="size of the sample; a sentence takes about 5 KB of memory for unigram, 2 KB for bpe "
        "(%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**63),
        default=0,
        metavar="N",
        help="random seed of the sample (%(default)s)",
    )
    add_chosen(parser)
    add_text_key(parser)


def run(arguments: argparse.Namespace) -> int:
    from shards.text.tokenizer import Tokenizer, train

    out: Path = arguments.out
    if out.suffix != ".model":
        raise UserError(f"{out}: OUT must be a file NAME.model, for example {out}/tokenizer.model")
    if out.exists():
        raise UserError(f"{out}: already exists; use another name or delete it")
    options = TextOptions("line", arguments.text_key)
    layout = open_sources(LAYOUTS, AUTO, arguments.source, options, report=False)
    findings: list[Finding] = []
    chooser = Chooser(arguments.only, arguments.leave_out)
    samples = once(chooser.chosen(layout.samples(findings)), findings)
    try:
        model = train(
            texts(layout, samples, findings),
            vocab_size=arguments.vocab_size,
            kind=arguments.model,
            sample=arguments.sentences,
            seed=arguments.seed,
        )
    except UserError as error:
        raise UserError("; ".join([str(error), *report_of(findings)])) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, model)
    print(f"{out}: {arguments.model}, {Tokenizer.load(out).vocab_size} ids")
    for line in report_of(chooser.findings(findings), chooser.not_chosen):
        print(line)
    return FINISHED


def texts(layout: TextLayout, samples: Iterable[Sample], findings: list[Finding]) -> Iterator[str]:
    for sample in samples:
        for item in layout.read(sample, findings):
            try:
                check_text(item.content)
            except ValueError as error:
                findings.append(of_error(item.name, error))
            else:
                yield item.content
