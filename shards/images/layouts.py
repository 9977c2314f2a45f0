"""Where the images of a corpus lie, by layout: what becomes which sample, and the classes.

- folder: a tree; the first folder below SOURCE is the class, as in torchvision's ImageFolder
  (https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html)
- imagenet: ILSVRC2012_img_train.tar, a tar with a tar of each class (https://image-net.org), or a
  folder with these
- manifest: .csv, .tsv or .jsonl with a header or keys, `path` (relative to the manifest) and others
- parquet: image columns as Hugging Face stores them, a struct of bytes and path, and labels by
  number (https://huggingface.co/docs/hub/datasets-image)
- webdataset: tars of KEY.jpg, .png or .webp with KEY.cls, .json, .txt
  (https://github.com/webdataset/webdataset)
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2v_ds.errors import UserError, suggestion
from shards import parquet
from shards.family import Input, Sample
from shards.images import tars
from shards.images.tars import EXTENSIONS, Layout
from shards.keys import make_key
from shards.walking import size_of, walk

MANIFESTS = (".csv", ".tsv", ".jsonl")


def recognise(source: Path) -> str:
    """Which layout lies there. Raises UserError."""
    if source.is_file():
        suffix = source.suffix.lower()
        if suffix in MANIFESTS:
            return "manifest"
        if suffix == ".parquet":
            return "parquet"
        if suffix == ".tar":
            return _kind_of_tar(source)
        raise UserError(
            f"{source}: is neither a folder, a manifest ({', '.join(MANIFESTS)}), a .parquet nor "
            "a .tar"
        )
    if not source.is_dir():
        raise UserError(f"{source}: no such folder or file")
    found = sorted(source.glob("*.tar"))
    if found:
        return _kind_of_tar(found[0])
    return "parquet" if next(source.rglob("*.parquet"), None) else "folder"


def _kind_of_tar(tar: Path) -> str:
    """imagenet: the tar holds tars, or images whose names begin with its own (n01440764.tar)."""
    with tar.open("rb") as file:
        first = next(tars.scan(file, tar.name, []), None)
    of_class = first and os.path.basename(first.name).startswith(f"{tar.stem}_")
    return "imagenet" if first and (first.name.endswith(".tar") or of_class) else "webdataset"


def open_layout(layout: str, source: Path, image_key: str, label_key: str) -> Layout:
    """Raises UserError."""
    if not source.exists():
        raise UserError(f"{source}: no such folder or file")
    if layout == "folder":
        return _folder(source)
    if layout == "manifest":
        return _manifest(source, label_key)
    if layout == "parquet":
        return _parquet(source, image_key, label_key)
    found = tars.imagenet(source) if layout == "imagenet" else tars.webdataset(source)
    return replace(found, samples=_some(found.samples, source))


def _some(samples: Iterable[Sample], source: Path) -> Iterator[Sample]:
    """Raises UserError when there are none."""
    empty = True
    for sample in samples:
        empty = False
        yield sample
    if empty:
        raise UserError(
            f"{source}: has no sample with one image ({', '.join(EXTENSIONS)}) in its tars"
        )


# ------------------------------------------------------------------------------------------- folder


def _folder(source: Path) -> Layout:
    if not source.is_dir():
        raise UserError(f"{source}: is a file; --layout folder takes a folder")
    with os.scandir(source) as entries:
        folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    return Layout(source, _walk(source), tuple(folders))


def _walk(root: Path) -> Iterator[Sample]:
    """Every image below a folder. Raises UserError when there is none."""
    found, others = False, Counter[str]()
    for path, name, size in walk(root):
        extension = os.path.splitext(name)[1].lower()
        if extension in EXTENSIONS:
            found = True
            label, below, _ = path.partition(os.sep)
            yield _sample(path, {"label": label} if below else {}, size)
        else:
            others[extension or name] += 1
    if not found:
        there = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5)) or "nothing"
        raise UserError(f"{root}: has no {', '.join(EXTENSIONS)} file in it (found: {there})")


def _sample(path: str, columns: dict[str, Any], size: int) -> Sample:
    return Sample(make_key(os.path.splitext(path)[0]), (Input(path),), columns, size)


# ----------------------------------------------------------------------------------------- manifest


def _manifest(source: Path, label_key: str) -> Layout:
    if source.suffix.lower() not in MANIFESTS or not source.is_file():
        raise UserError(f"{source}: a manifest is a file, {', '.join(MANIFESTS)}")
    labels: set[str] = set()
    empty = True
    for row in _rows(source):  # once for the classes, once for the plan
        empty = False
        if label_key in row:
            labels.add(str(row[label_key]))
    if empty:
        raise UserError(f"{source}: lists no image")
    return Layout(source.parent, _listed(source, label_key), tuple(sorted(labels)))


def _listed(source: Path, label_key: str) -> Iterator[Sample]:
    for row in _rows(source):
        columns = {key: value for key, value in row.items() if key not in ("path", label_key)}
        if label_key in row:
            columns["label"] = str(row[label_key])
        yield _sample(row["path"], columns, size_of(source.parent / row["path"]))


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    """Of a manifest. Raises UserError."""
    read = _json_rows if source.suffix.lower() == ".jsonl" else _csv_rows
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            for number, row in read(file, source):
                path = row.get("path")
                if not isinstance(path, str) or not path or "\0" in path:
                    raise UserError(
                        f"{source}, line {number}: has no `path`{suggestion('path', row)}"
                    )
                yield row
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8 ({error})") from None


def _csv_rows(file: io.TextIOWrapper, source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(file, delimiter="\t" if source.suffix.lower() == ".tsv" else ",")
    try:
        header = next(rows, [])
        if "path" not in header or len(set(header)) != len(header):
            raise UserError(
                f"{source}: its first line must name the columns, each once, one of them `path`; "
                f"it names {', '.join(header) or 'none'}"
            )
        for cells in rows:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{source}, line {rows.line_num}: {len(cells)} columns, the header has "
                    f"{len(header)}"
                )
            yield rows.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{source}, line {rows.line_num}: {error}") from None


def _json_rows(file: io.TextIOWrapper, source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}, line {number}: is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{source}, line {number}: is no JSON object")
        yield number, row


# ------------------------------------------------------------------------------------------ parquet


def _parquet(source: Path, image_key: str, label_key: str) -> Layout:
    root = source if source.is_dir() else source.parent
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise UserError(f"{source}: has no .parquet file in it")
    classes: tuple[str, ...] = ()
    for file in files:
        try:
            table = parquet.open_table(file)
        except UserError:
            raise
        except ValueError:  # converting it will say why
            continue
        names = table.schema_arrow.names
        if image_key not in names:
            raise UserError(
                f"--image-key: {file} has no column {image_key!r}{suggestion(image_key, names)}"
            )
        classes = _class_names(table, label_key)
        break
    samples = (
        Sample(make_key(f"{os.path.splitext(part.path)[0]}-{i}"), (part,), {}, size)
        for file in files
        for i, (part, size) in enumerate(parquet.row_groups(root, str(file.relative_to(root))))
    )
    return Layout(root, samples, classes)


def _class_names(table: Any, label_key: str) -> tuple[str, ...]:
    """As the datasets library notes them in the schema; () when it does not."""
    raw = (table.schema_arrow.metadata or {}).get(b"huggingface", b"")
    try:
        names = json.loads(raw)["info"]["features"][label_key]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names))
