"""The scan of headers: intact tars as tarfile and webdataset read them, and damaged ones."""

from __future__ import annotations

import gc
import io
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from d2v_ds.data.tar_scan import BLOCK, DamagedTar, Member, members, next_header, samples

NAMES = [
    "a.flac",
    "a.json",
    "folder/with.dot/b.seg.JPG",
    "folder/with.dot/b.cls",
    "ä/größe.txt",
    "long/" * 60 + "name.txt",
    "x" * 140 + ".txt",
]


def tar_of(names: list[str], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """The content of a member is its first letter; its size is 300 times its number."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        tar.addfile(folder := tarfile.TarInfo("folder"))
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 300 * i
            tar.addfile(member, io.BytesIO(name.encode()[:1] * member.size))
    return buffer.getvalue()


def scan(data: bytes, **bounds: int) -> list[Member]:
    return list(members(io.BytesIO(data), **bounds))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_equal_tarfiles(kind: int) -> None:
    data = tar_of(NAMES, kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert scan(data) == theirs and len(theirs) == len(NAMES) + 1


def test_a_tar_within_a_tar() -> None:
    inner = tar_of(["a.txt", "b.txt"])
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as tar:
        for name in ("one.tar", "two.tar"):
            member = tarfile.TarInfo(name)
            member.size = len(inner)
            tar.addfile(member, io.BytesIO(inner))
    data = outer.getvalue()
    for whole in scan(data):
        found = scan(data, start=whole.offset, end=whole.offset + whole.size)
        expected = [(m.name, m.offset + whole.offset) for m in scan(inner)]
        assert [(m.name, m.offset) for m in found] == expected


def test_large_sizes_and_old_headers() -> None:
    member = tarfile.TarInfo("big.txt")
    member.size = 9 << 30  # in base 256, because 11 octal digits only reach 8 GiB
    header = member.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(
        DamagedTar, match=r"big\.txt: its 9663676416 bytes extend past the end at byte 0"
    ):
        scan(header + bytes(1024))
    old = tarfile.TarInfo("v7.txt")
    old.type = tarfile.AREGTYPE
    assert scan(old.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)) == [Member("v7.txt", BLOCK, 0)]


# ---------------------------------------------------------------------------------------- grouping


def read_by_webdataset(path: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        result = list(wds.WebDataset([str(path)], shardshuffle=False, empty_check=False))
        gc.collect()
    return result


def test_samples_equal_webdatasets(tmp_path: Path) -> None:
    names = [*NAMES, "a.txt", ".hidden.txt", "d/.b", "none", "a.b/c", "a.b/c.x.y", "d/e..x"]
    names += ["__meta__", "__meta__/x.txt", "k/__key__.txt", "__half.txt"]
    data = tar_of(names)
    (tmp_path / "x.tar").write_bytes(data)
    # webdataset reads the hidden file d/.b as the field b of a sample d/.
    theirs = [one for one in read_by_webdataset(tmp_path / "x.tar") if one["__key__"] != "d/"]
    ours = list(samples(scan(data)))
    assert [key for key, _ in ours] == [sample["__key__"] for sample in theirs]
    for (_, group), sample in zip(ours, theirs, strict=True):
        fields = {name: sample[name] for name in sample if not name.startswith("__")}
        assert {n: data[m.offset : m.offset + m.size] for n, m in group.items()} == fields


def test_a_repeated_field_begins_a_sample() -> None:
    """webdataset raises an error there."""
    found = list(samples(scan(tar_of(["a.x", "a.y", "a.X"]))))
    assert [(key, list(group)) for key, group in found[1:] if key == "a"] == [("a", ["x"])]
    assert [list(group) for _, group in found] == [["x", "y"], ["x"]]


# ------------------------------------------------------------------------------------------ damage


def damage_at(data: bytes) -> tuple[list[str], DamagedTar]:
    found = []
    with pytest.raises(DamagedTar) as raised:
        for member in members(io.BytesIO(data)):
            found.append(member.name)
    return found, raised.value


PLAIN = tar_of([f"{i}.txt" for i in range(6)])
AT = PLAIN.index(b"3.txt")


def test_damaged_header() -> None:
    for offset in (AT, AT + 130, AT + 150):
        data = bytearray(PLAIN)
        data[offset] ^= 4
        found, error = damage_at(bytes(data))
        assert found[-1] == "2.txt" and error.offset == AT and "damaged header" in str(error)


def test_zeros_in_the_middle() -> None:
    found, error = damage_at(PLAIN[:AT] + bytes(512) + PLAIN[AT + 512 :])
    assert found[-1] == "2.txt" and error.offset == AT and "zeros" in str(error)


def test_truncated() -> None:
    found, error = damage_at(PLAIN[:AT])
    assert found[-1] == "2.txt" and "ends without its end-of-archive mark" in str(error)
    found, error = damage_at(PLAIN[: AT + 700])
    assert found[-1] == "2.txt" and "3.txt: its 900 bytes extend past the end" in str(error)
    for size in (0, 1, 511):
        assert damage_at(PLAIN[:size])[0] == []


def test_two_archives_in_one_file() -> None:
    """tarfile and webdataset only see the first."""
    other = tar_of(["x.txt", "y.txt"])
    found = scan(PLAIN + other)
    numbered = [f"{i}.txt" for i in range(6)]
    assert [m.name for m in found] == ["folder", *numbered, "folder", "x.txt", "y.txt"]
    assert found[-1].offset == len(PLAIN) + other.index(b"y.txt") + BLOCK
    short = PLAIN[: PLAIN.index(b"5.txt") + BLOCK + 1536] + bytes(2 * BLOCK)
    found = scan(short + other)
    assert len(found) == 10, "after two zero blocks, as Go and Rust write them"


def test_zeros_that_end_no_archive_are_damage() -> None:
    for blocks in (1, 3, 8):
        holed = PLAIN[:AT] + bytes(blocks * BLOCK) + PLAIN[AT:]
        found, error = damage_at(holed)
        assert found[-1] == "2.txt" and error.offset == AT and "zeros" in str(error)


def test_members_after_damage_are_found() -> None:
    data = bytearray(PLAIN)
    data[AT : AT + 512] = b"\xff" * 512
    file = io.BytesIO(bytes(data))
    _, error = damage_at(bytes(data))
    start = next_header(file, error.offset)
    assert start is not None
    assert [member.name for member in members(file, start)] == ["4.txt", "5.txt"]
    damage: list[DamagedTar] = []
    names = [member.name for member in members(file, damage=damage)]
    assert names == ["folder", "0.txt", "1.txt", "2.txt", "4.txt", "5.txt"]
    assert [error.offset for error in damage] == [AT]
    assert next_header(file, len(data)) is None


def test_damaged_pax_headers() -> None:
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    for records in (b"nonsense", b"99 path=x\n", b"0 path=x\n", b"-1 path=x\n", b" path=x"):
        header.size = len(records)
        data = header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + bytes(1024)
        with pytest.raises(DamagedTar, match="damaged pax header"):
            scan(data)


def pax_member(records: bytes, payload: bytes = b"x" * 9) -> bytes:
    """A tar of one member, with these pax records before it."""
    found = io.BytesIO()
    for name, kind, data in (("PaxHeader", tarfile.XHDTYPE, records), ("a.npy", b"0", payload)):
        member = tarfile.TarInfo(name)
        member.type, member.size = kind, len(data)
        found.write(member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK))
    return found.getvalue() + bytes(2 * BLOCK)


@pytest.mark.parametrize(
    "records",
    [
        b"12 size=abc\n",
        b"11 size=-1\n",
        b"11 size=1_\n",
        b"29 size=99999999999999999999\n",
        b"12 size=9999",  # no newline
        b"0 size=1\n",
        b"1 size=1\n",
        b"9" * 5000 + b" size=1\n",
        b"2 2 2 2 2 2 ",
        b"18 path=" + b"a" * 400,
        b"70009 path=" + b"a" * 69_997 + b"\n",
    ],
)
def test_hostile_pax_records(records: bytes) -> None:
    with pytest.raises(DamagedTar):
        list(members(io.BytesIO(pax_member(records))))


def test_many_pax_records_take_linear_time() -> None:
    records = b"5 a=\n" * 200_000
    assert [m.name for m in members(io.BytesIO(pax_member(records)))] == ["a.npy"]


def test_names_and_links_take_bounded_time_and_memory() -> None:
    """Links in circles, and paths of thousands of folders."""
    buffer = io.BytesIO()
    deep = "a/" * 30_000 + "x.wav"
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, target in ((deep, ""), ("l", "m"), ("m", "l"), ("n.wav", deep), ("o.wav", "l/x")):
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE if target else tarfile.REGTYPE
            member.linkname = target
            tar.addfile(member)
        for i in range(200):
            member = tarfile.TarInfo(f"p{i}")
            member.type, member.linkname = tarfile.SYMTYPE, f"p{i + 1}/p{i + 1}"
            tar.addfile(member)
    found = list(members(io.BytesIO(buffer.getvalue())))
    assert found[0].name == deep and not found[0].problem
    assert all(member.problem for member in found[1:])
