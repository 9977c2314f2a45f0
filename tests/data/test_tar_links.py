"""Links and sparse files in tars: the payload of a link is that of its target."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from d2v_ds.data.tar_scan import DamagedTar, Member, members

HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE
Part = tuple[str, bytes | tuple[bytes, str] | None]  # content, (type, target) or None: a folder


def tar_of(*parts: Part, kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in parts:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(content, tuple):
                member.type, member.linkname = content
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def read(data: bytes) -> dict[str, bytes | tuple[str, str]]:
    """{name: payload, or (kind, reason) of the problem}."""
    found: dict[str, bytes | tuple[str, str]] = {}
    for member in members(io.BytesIO(data)):
        payload = data[member.offset : member.offset + member.size]
        found[member.name] = tuple(member.problem) if member.problem else payload
    return found


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_have_the_payload_of_their_target(kind: int) -> None:
    long = "folder/" * 30 + "long.txt"
    data = tar_of(
        ("before.txt", (SYMBOLIC, "d/a.txt")),
        ("hard before.txt", (HARD, "./d/a.txt")),
        ("d/a.txt", b"content"),
        ("d/hard.txt", (HARD, "d/a.txt")),
        ("d/to link.txt", (HARD, "d/hard.txt")),
        ("d/symbolic.txt", (SYMBOLIC, "./a.txt")),
        ("e/up.txt", (SYMBOLIC, "../d/symbolic.txt")),
        (long, b"a long name"),
        ("hard to long.txt", (HARD, long)),
        ("to long.txt", (SYMBOLIC, long)),
        kind=kind,
    )
    names = ["before.txt", "hard before.txt", "d/a.txt", "d/hard.txt", "d/to link.txt"]
    names += ["d/symbolic.txt", "e/up.txt"]
    assert read(data) == dict.fromkeys(names, b"content") | dict.fromkeys(
        [long, "hard to long.txt", "to long.txt"], b"a long name"
    )


def test_a_link_through_a_linked_folder() -> None:
    data = tar_of(
        ("real", None),
        ("real/a.txt", b"content"),
        ("other", (SYMBOLIC, "real")),
        ("again", (SYMBOLIC, "other/")),
        ("b.txt", (SYMBOLIC, "again/a.txt")),
    )
    assert read(data) == {"real/a.txt": b"content", "b.txt": b"content"}


def test_links_without_a_target_have_a_problem() -> None:
    data = tar_of(
        ("a.txt", (HARD, "gone.txt")),
        ("b.txt", (SYMBOLIC, "../outside.txt")),
        ("c.txt", (SYMBOLIC, "/etc/passwd")),
        ("d.txt", (SYMBOLIC, "e.txt")),
        ("e.txt", (SYMBOLIC, "d.txt")),
        ("f.txt", (HARD, "f.txt")),
        ("g.txt", b"content"),
    )
    missing = "is a link to {}, which the tar does not contain"
    targets = {"a": "gone.txt", "b": "../outside.txt", "c": "/etc/passwd", "d": "e.txt"}
    targets["e"] = "d.txt"
    expected = {f"{k}.txt": ("link", missing.format(target)) for k, target in targets.items()}
    found = read(data)
    assert found.pop("f.txt") == ("link", "is a link to f.txt, which leads back to itself")
    assert found == {**expected, "g.txt": b"content"}


def test_a_replaced_member() -> None:
    """tar -r appends a new version; a hard link names the last one before it."""
    data = tar_of(
        ("a.txt", b"old"), ("b.txt", (HARD, "a.txt")), ("a.txt", b"new"), ("c.txt", (HARD, "a.txt"))
    )
    found = [data[m.offset : m.offset + m.size] for m in members(io.BytesIO(data))]
    assert found == [b"old", b"old", b"new", b"new"]


def test_a_link_whose_header_states_a_size_has_no_payload() -> None:
    link = tarfile.TarInfo("b.txt")
    link.type, link.linkname, link.size = HARD, "a.txt", 7
    data = tar_of(("a.txt", b"content"))[:1024] + link.tobuf(tarfile.USTAR_FORMAT)
    data += tar_of(("c.txt", b"other"))
    assert read(data) == {"a.txt": b"content", "b.txt": b"content", "c.txt": b"other"}


def test_links_of_a_damaged_tar() -> None:
    data = bytearray(tar_of(("a.txt", b"content"), ("b.txt", b"lost"), ("c.txt", (HARD, "a.txt"))))
    data[1024:1100] = b"\xff" * 76
    damage: list[DamagedTar] = []
    found = list(members(io.BytesIO(bytes(data)), damage=damage))
    assert found == [Member("a.txt", 512, 7), Member("c.txt", 512, 7)] and len(damage) == 1


# ------------------------------------------------------------------------------------ sparse files


@pytest.mark.skipif(not shutil.which("tar"), reason="needs GNU tar")
@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=pax", "--sparse-version=0.0"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=1.0"],
    ],
    ids=["gnu", "pax-0.0", "pax-0.1", "pax-1.0"],
)
def test_sparse_files_have_a_problem(options: list[str], tmp_path: Path) -> None:
    with (tmp_path / "a.wav").open("wb") as file:
        for i in range(40):  # more pieces than the header has room for
            file.seek(i * 65_536)
            file.write(b"piece")
    status = (tmp_path / "a.wav").stat()
    if status.st_blocks * 512 >= status.st_size:
        pytest.skip("this file system stores no holes")
    (tmp_path / "b.txt").write_text("whole")
    command = ["tar", "-cSf", "x.tar", *options, "a.wav", "b.txt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    data = (tmp_path / "x.tar").read_bytes()
    reason = (
        "is stored as a sparse file, in pieces; unpack the tar and pack it again without --sparse"
    )
    assert read(data) == {"a.wav": ("format", reason), "b.txt": b"whole"}
