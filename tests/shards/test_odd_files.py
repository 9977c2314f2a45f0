"""Files that are no recordings, in folders and tars."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.data.tar_index import index_tar
from d2v_ds.errors import UserError
from d2v_ds.modalities import sample_formats
from shards.cli import main
from shards.images.webdataset import WebDataset as ImageTars
from shards.layout import find
from shards.parquet import open_table
from shards.speech import LAYOUTS
from shards.speech.folder import Folder
from shards.speech.librispeech import LibriSpeech
from shards.speech.parquet import Parquet
from shards.speech.webdataset import WebDataset
from tests.helpers.corpora import contents, found, put, put_tar, recording
from tests.shards.pictures import picture


def test_hidden_members_and_tars_without_files(tmp_path: Path) -> None:
    """macOS stores `._NAME` next to NAME."""
    clip = recording()
    tar = put_tar(tmp_path / "in/a.tar", [("x/._a.wav", b"mac"), ("x/a.wav", clip), ("x/b", b"")])
    (tmp_path / "in/b.tar").write_bytes(bytes(10240))
    (tmp_path / "in/c.tar").write_bytes(b"")
    findings: list[Finding] = []
    assert len(list(WebDataset.open(tmp_path / "in", None).samples(findings))) == 1
    assert [(one.name, one.kind) for one in findings] == [
        ("a.tar, x/._a.wav", "hidden"),
        ("a.tar, x/b", "unused"),
        ("b.tar", "empty"),
        ("c.tar", "empty"),
    ]
    [form] = [form for form in sample_formats() if form.modality == "speech"]
    indexed = index_tar((tar, form, "none"))
    assert indexed.entry.samples == 1 and not indexed.left_out
    assert [one.kind for one in indexed.notes] == ["hidden", "unused"]


def test_pipes_are_not_read(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", recording())
    os.mkfifo(tmp_path / "b.wav")
    found: list[Finding] = []
    assert len(list(Folder.open(tmp_path, None).samples(found))) == 1
    assert [(one.name, one.kind) for one in found] == [("b.wav", "type")]
    with pytest.raises(UserError, match=r"b.wav: is a pipe, socket or device; SOURCE must be a"):
        find(LAYOUTS, "auto", tmp_path / "b.wav")


def test_a_parquet_file_that_vanishes_is_unreadable(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(Unusable, match=r"^No such file or directory$") as raised:
        open_table(tmp_path / "a.parquet")
    assert raised.value.kind == "unreadable"


def test_members_of_tars_that_are_no_files(tmp_path: Path) -> None:
    """Pipes and devices have no content. A type that is not known counts as a file, as POSIX says;
    the rest of a file that another volume begins is not usable."""
    clip, image = recording(), picture()
    types = {"b": tarfile.FIFOTYPE, "c": tarfile.CHRTYPE, "d": tarfile.BLKTYPE}
    types |= {"a": tarfile.REGTYPE, "e": b"Z", "f": b"M", "g": tarfile.DIRTYPE, "h": b"V"}
    for kind, content in (("wav", clip), ("png", image)):
        with tarfile.open(tmp_path / f"{kind}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, type_ in types.items():
                member = tarfile.TarInfo(f"{name}.{kind}")
                member.type = type_
                has_content = name in "aef"
                member.size = len(content) if has_content else 0
                tar.addfile(member, io.BytesIO(content) if has_content else None)
    layouts = {"wav": WebDataset, "png": ImageTars}
    for kind, layout in layouts.items():
        found: list[Finding] = []
        made = layout.open(tmp_path / f"{kind}.tar", None).samples(found)
        assert sorted(sample.key for sample in made) == ["a", "e"]
        assert {(one.name.removesuffix(f".{kind}")[-1], one.kind) for one in found} == {
            *((name, "type") for name in "bcd"),
            ("f", "format"),
        }
    [form] = [form for form in sample_formats() if form.modality == "speech"]
    indexed = index_tar((tmp_path / "wav.tar", form, "none"))
    assert indexed.entry.samples == 2 and [one.kind for one in indexed.notes] == ["type"] * 3


def special_files(folder: Path) -> dict[str, str]:
    """{path: the reason} of files that a manifest cannot name."""
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "pipe.wav")
    (folder / "folder.wav").mkdir()
    what = "is a pipe, socket or device, not a file"
    return {"pipe.wav": what, "/dev/zero": what, "folder.wav": "is a folder, not a file"}


@pytest.mark.parametrize("part", [{}, {"start": 1.0}, {"start": 1.0, "end": 2.0}, {"channel": 0}])
def test_rows_that_name_no_file(part: dict[str, float], tmp_path: Path) -> None:
    special = special_files(tmp_path)
    put(tmp_path / "a.wav", recording(seconds=2))
    rows = [{"path": path} | part for path in ("a.wav", *special)]
    put(tmp_path / "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    words = ["speech", str(tmp_path / "m.jsonl"), str(out), "-j1", "--max-bad", "0.9"]
    assert main(words) == 0
    assert len(contents(out)) == 1
    listed = found(out, "quarantine.jsonl")
    assert {kind for _, kind in listed.values()} <= {"unreadable", "row"} and len(listed) == 3
    if "end" in part or "channel" in part or not part:
        reasons = {name.partition(",")[0]: reason for name, (reason, _) in listed.items()}
        assert reasons == special


def test_pipes_in_librispeech(tmp_path: Path) -> None:
    folder = tmp_path / "in/1/2"
    put(folder / "1-2-0000.flac", recording("flac", 0.1))
    for name in ("1-2-0001.flac", "1-2.trans.txt"):
        os.mkfifo(folder / name)
    assert LibriSpeech.recognises(tmp_path / "in")
    os.mkfifo(tmp_path / "in/1/2/1-2-0000.json")
    findings: list[Finding] = []
    assert len(list(LibriSpeech.open(tmp_path / "in", None).samples(findings))) == 1
    assert [(one.name, one.kind) for one in findings] == [
        (f"1/2/{name}", "type") for name in ("1-2-0000.json", "1-2-0001.flac", "1-2.trans.txt")
    ]


def test_pipes_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    special = special_files(tmp_path)
    table = pyarrow.table({"audio": [{"bytes": None, "path": path} for path in special]})
    parquet.write_table(table, tmp_path / "a.parquet")
    layout = Parquet.open(tmp_path / "a.parquet", None)
    findings: list[Finding] = []
    for sample in layout.samples(findings):
        assert not list(layout.read(sample, findings))
    assert [(one.kind, one.reason) for one in findings] == [
        ("unreadable", reason) for reason in special.values()
    ]
