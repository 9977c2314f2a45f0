"""One small corpus per layout of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.corpora import put, put_tar, recording
from tests.shards.pictures import picture


def put_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def librispeech(folder: Path) -> Path:
    put(folder / "1/2/1-2-0000.flac", recording("flac"))
    put(folder / "1/2/1-2.trans.txt", "1-2-0000 HELLO\n")
    return folder


def commonvoice(folder: Path) -> Path:
    put(folder / "clips/a.mp3", recording("mp3"))
    put(folder / "validated.tsv", "client_id\tpath\tsentence\nc\ta.mp3\thello\n")
    return folder


def commonvoice_table(folder: Path) -> Path:
    return commonvoice(folder) / "validated.tsv"


def fairseq(folder: Path) -> Path:
    put(folder / "audio/a.wav", recording())
    return put(folder / "train.tsv", f"{folder / 'audio'}\na.wav\t4800\n")


def speech_jsonl(folder: Path) -> Path:
    put(folder / "a.wav", recording())
    return put(folder / "a.jsonl", '{"path": "a.wav"}\n')


def speech_manifest(folder: Path) -> Path:
    put(folder / "a.wav", recording())
    return put(folder / "a.tsv", "path\tlabel\na.wav\t1\n")


def speech_tars(folder: Path) -> Path:
    put_tar(folder / "a.tar", [("x/a.wav", recording()), ("x/a.txt", b"hello")])
    return folder


def speech_folder(folder: Path) -> Path:
    put(folder / "deep/a.opus", recording("opus"))
    return folder


def speech_parquet(folder: Path) -> Path:
    cells = [{"bytes": recording(), "path": "a.wav"}]
    put_parquet(folder / "data/train-00000-of-00001.parquet", {"audio": cells, "text": ["hello"]})
    return folder


def imagenet(folder: Path) -> Path:
    put_tar(folder / "n01.tar", [("n01_1.JPEG", picture("JPEG"))])
    return folder


def imagenet_nested(folder: Path) -> Path:
    inner = imagenet(folder / "inner") / "n01.tar"
    return put_tar(folder / "train.tar", [("n01.tar", inner.read_bytes())])


def image_tars(folder: Path) -> Path:
    put_tar(folder / "a.tar", [("x/a.png", picture()), ("x/a.cls", b"1")])
    return folder


def image_manifest(folder: Path) -> Path:
    put(folder / "a.png", picture())
    return put(folder / "a.csv", "path,label\na.png,1\n")


def image_parquet(folder: Path) -> Path:
    put_parquet(folder / "a.parquet", {"image": [{"bytes": picture(), "path": "a.png"}]})
    return folder


def image_folder(folder: Path) -> Path:
    put(folder / "cat/a.png", picture())
    return folder


def plain(folder: Path) -> Path:
    return put(folder / "a.txt", "hello\n")


def text_jsonl(folder: Path) -> Path:
    return put(folder / "a.jsonl", '{"text": "hello"}\n')


def text_csv(folder: Path) -> Path:
    return put(folder / "a.csv", 'id,text\n1,"hello"\n')


def text_tsv(folder: Path) -> Path:
    return put(folder / "a.tsv", "id\ttext\n1\thello\n")


def text_parquet(folder: Path) -> Path:
    return put_parquet(folder / "a.parquet", {"text": ["hello"]})


def text_folder(folder: Path) -> Path:
    plain(folder), text_jsonl(folder / "deep"), text_parquet(folder / "deep")
    return folder


CORPORA: list[tuple[str, str, Callable[[Path], Path]]] = [
    ("speech", "librispeech", librispeech),
    ("speech", "commonvoice", commonvoice),
    ("speech", "commonvoice", commonvoice_table),
    ("speech", "fairseq", fairseq),
    ("speech", "jsonl", speech_jsonl),
    ("speech", "manifest", speech_manifest),
    ("speech", "webdataset", speech_tars),
    ("speech", "parquet", speech_parquet),
    ("speech", "folder", speech_folder),
    ("images", "imagenet", imagenet),
    ("images", "imagenet", imagenet_nested),
    ("images", "webdataset", image_tars),
    ("images", "manifest", image_manifest),
    ("images", "parquet", image_parquet),
    ("images", "folder", image_folder),
    ("text", "txt", plain),
    ("text", "jsonl", text_jsonl),
    ("text", "csv", text_csv),
    ("text", "tsv", text_tsv),
    ("text", "parquet", text_parquet),
    ("text", "folder", text_folder),
]
