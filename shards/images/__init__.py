"""d2v-shards images: the options of the family, and the corpus that they describe."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from shards.arguments import number

if TYPE_CHECKING:
    from shards.family import Corpus

DESCRIPTION = (
    "Convert images to a shard set: jpg, png and webp go in byte for byte, other formats as png. "
    "Interrupted or killed, the same command goes on."
)
SOURCE = "a folder, a manifest, Parquet or tars; see --layout"
LAYOUTS = ("folder", "imagenet", "manifest", "parquet", "webdataset")


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--layout",
        choices=("auto", *LAYOUTS),
        default="auto",
        help="folder: a tree, class = subfolder; imagenet: a tar of tars or a folder of tars, "
        "class = tar; manifest: .csv, .tsv or .jsonl with path and label; parquet: as Hugging Face "
        "stores images; webdataset: tars of KEY.jpg, KEY.cls, KEY.json, KEY.txt (%(default)s)",
    )
    parser.add_argument(
        "--resize",
        type=number(int, 1, 65_536),
        default=None,
        metavar="N",
        help="make the shorter side N pixels where it is longer, at quality 95; else nothing is "
        "encoded again",
    )
    parser.add_argument(
        "--label-key",
        default="label",
        metavar="NAME",
        help="the column that is the class, of manifests and Parquet (%(default)s)",
    )
    parser.add_argument(
        "--image-key",
        default="image",
        metavar="NAME",
        help="the column of Parquet that is the image (%(default)s)",
    )


def read(arguments: argparse.Namespace) -> Corpus:
    """Raises UserError."""
    from shards.family import Corpus
    from shards.images import layouts
    from shards.images.converter import ImageConverter

    layout = arguments.layout
    if layout == "auto":
        layout = layouts.recognise(arguments.source)
        print(f"{arguments.source}: layout {layout}")
    found = layouts.open_layout(layout, arguments.source, arguments.image_key, arguments.label_key)
    options: dict[str, Any] = {"layout": layout, "resize": arguments.resize}
    if layout in ("manifest", "parquet"):
        options["label-key"] = arguments.label_key
    if layout == "parquet":
        options["image-key"] = arguments.image_key
    image_key = arguments.image_key if layout == "parquet" else ""
    converter = ImageConverter(
        found.root, found.classes, arguments.resize, image_key, arguments.label_key
    )
    return Corpus(found.samples, converter, options, rejected=found.rejected)
