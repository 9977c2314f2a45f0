"""Files that are no recordings, in folders and tars."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.data.tar_index import index_tar
from d2v_ds.errors import UserError
from d2v_ds.modalities import sample_formats
from shards.images.webdataset import WebDataset as ImageTars
from shards.layout import find
from shards.parquet import open_table
from shards.speech import LAYOUTS
from shards.speech.folder import Folder
from shards.speech.webdataset import WebDataset
from tests.helpers.corpora import put, put_tar, recording
from tests.shards.pictures import picture


def test_hidden_members_and_tars_without_files(tmp_path: Path) -> None:
    """macOS stores `._NAME` next to NAME."""
    clip = recording()
    tar = put_tar(tmp_path / "in/a.tar", [("x/._a.wav", b"mac"), ("x/a.wav", clip), ("x/b", b"")])
    (tmp_path / "in/b.tar").write_bytes(bytes(10240))
    (tmp_path / "in/c.tar").write_bytes(b"")
    found: list[Finding] = []
    assert len(list(WebDataset.open(tmp_path / "in", None).samples(found))) == 1
    assert [(one.name, one.kind) for one in found] == [
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
