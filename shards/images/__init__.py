"""d2v-shards images: the table of layouts and the options; converter.py makes the members of a
sample."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from shards.arguments import number
from shards.images.folder import Folder
from shards.images.imagenet import ImageNet
from shards.images.layout import ImageLayout, ImageOptions
from shards.images.manifest import Manifest
from shards.images.parquet import Parquet
from shards.images.webdataset import WebDataset
from shards.several import open_sources

if TYPE_CHECKING:
    from d2v_ds.data.checks import Finding
    from shards.family import Corpus

DESCRIPTION = (
    "Converts images to a shard set. JPEG, PNG and WebP files of 8 bits per channel are stored "
    "unchanged, others as PNG. An interrupted conversion resumes if the same command is run again."
)
KEEP = "keep"
# The first layout that recognises SOURCE is used, so general layouts come last.
LAYOUTS: list[type[ImageLayout]] = [ImageNet, WebDataset, Manifest, Parquet, Folder]


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--resize",
        type=number(int, 1, 65_536),
        default=None,
        metavar="N",
        help="downsize larger images so that the shorter side is N pixels, with quality 95; other "
        "images are not re-encoded",
    )
    parser.add_argument(
        "--encode",
        choices=(KEEP, "jpg", "png"),
        default=KEEP,
        help="store every image as jpg (quality 95, unless it is jpg already) or as png; keep "
        "leaves JPEG, PNG and WebP files as they are, so a set can have all three (%(default)s)",
    )
    parser.add_argument(
        "--label-key",
        default="label",
        metavar="NAME",
        help="column of manifests and Parquet files with the class (%(default)s)",
    )
    parser.add_argument(
        "--image-key",
        default="image",
        metavar="NAME",
        help="column of Parquet files with the image (%(default)s)",
    )


def read(arguments: argparse.Namespace) -> Corpus:
    """The corpus that the command line names. Raises UserError."""
    from shards.family import Corpus
    from shards.images.converter import ImageConverter

    layout = open_sources(
        LAYOUTS,
        arguments.layout,
        arguments.source,
        ImageOptions(arguments.image_key, arguments.label_key),
    )
    for remark in layout.remarks:
        print(f"{layout.source}: {remark}")
    options: dict[str, Any] = {"layout": layout.name, "resize": arguments.resize}
    options["encode"] = arguments.encode
    options |= {name.replace("_", "-"): getattr(layout.options, name) for name in layout.uses}
    findings: list[Finding] = []
    encode = "" if arguments.encode == KEEP else arguments.encode
    converter = ImageConverter(layout, arguments.resize, encode)
    return Corpus(layout.samples(findings), converter, options, findings=findings)
