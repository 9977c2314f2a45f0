"""Remote sets through the cache: a real HTTP server that truncates answers, dies and comes back;
one download per node; a limit in bytes that spares open shards."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.data import download
from d2v_ds.data.cache.folder import Cache
from d2v_ds.data.cache.remote import open_remote, open_shard, prefetch
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.reading import read_samples
from tests.data.test_download import tape
from tests.helpers.http_server import Server, start, stop
from tests.helpers.series import modality as series_modality
from tests.helpers.series import write_set

LENGTHS = [[50] * 40, [60] * 30, [70] * 20, [80] * 40]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_set(tmp_path_factory.mktemp("far") / "series", LENGTHS)


@pytest.fixture
def far(shards: ShardSet) -> Iterator[Server]:
    state = Server("", Counter())
    server = start(state, shards.root.parent)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/{shards.root.name}"
    yield state
    stop(server)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE", 0.02)
    return Cache.from_environment()


def tars(cache: Cache) -> set[str]:
    return {file.name for file in cache.folder.glob("*/*.tar")}


def content(shards: ShardSet) -> list[Any]:
    return list(read_samples(shards, ("series", "json")))


def test_a_remote_set_is_read_as_a_local_one(far: Server, cache: Cache, shards: ShardSet) -> None:
    remote = find_set(far.url, "series")
    assert tars(cache) == set(), "only indexes so far"
    assert (remote.shards, remote.modality) == (shards.shards, shards.modality)
    assert content(remote) == content(shards)
    assert content(find_set(far.url)) == content(shards)
    names = [f"{entry.name}.tar" for entry in shards.shards]
    assert [far.asked[name] for name in names] == [1] * 4
    with pytest.raises(UserError, match="holds series, but speech is required"):
        find_set(far.url, "speech")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_on_a_remote_set(
    far: Server, cache: Cache, shards: ShardSet, workers: int
) -> None:
    def batches(found: ShardSet) -> list[tuple[str, ...]]:
        settings: dict[str, Any] = {"seed": 1, "size": 800, "micro_batches": 2}
        with closing(Loader(found, series_modality(), workers=workers, **settings)) as loader:  # type: ignore[arg-type]
            return [b.keys for step in islice(loader, 12) for b in step.micro_batches]

    assert batches(find_set(far.url)) == batches(shards)


def test_shards_are_downloaded_in_advance(far: Server, cache: Cache, shards: ShardSet) -> None:
    found = find_set(far.url)
    settings: dict[str, Any] = {"seed": 1, "size": 800, "micro_batches": 2}
    with closing(Loader(found, series_modality(), **settings)) as loader:  # type: ignore[arg-type]
        assert tars(cache) == set()
        next(loader)
        deadline = time.monotonic() + 10
        while len(tars(cache)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(tars(cache)) == 4 and len(loader.reader.open) < 4


def test_at_most_half_of_the_cache_is_filled_in_advance(far: Server, cache: Cache) -> None:
    found = open_remote(far.url)
    small = Cache(cache.folder, 2 * (found.shards[2].bytes + found.shards[1].bytes))
    prefetch(found, iter([2, 1, 0, 3]), small)
    assert tars(cache) == {"series-000002.tar", "series-000001.tar"}
    prefetch(found, iter([1, 2, 1, 0]), Cache(cache.folder, 10**9))
    assert tars(cache) == {"series-000002.tar", "series-000001.tar"}, "stops at the next epoch"
    assert far.asked["series-000001.tar"] == far.asked["series-000002.tar"] == 1


def test_truncated_answers_and_errors_of_the_server_are_retried(
    far: Server, cache: Cache, shards: ShardSet
) -> None:
    far.answer = {
        "series-000000.idx": ["short", 503],
        "series-000001.tar": ["short", 500, "short"],
        "series-000002.tar": [429],
    }
    assert content(open_remote(far.url)) == content(shards)
    assert far.asked["series-000000.idx"] == 3 and far.asked["series-000001.tar"] == 4


def test_a_server_that_dies_and_comes_back(
    shards: ShardSet, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    state = Server("", Counter())
    server = start(state, shards.root.parent)
    port = server.server_address[1]
    remote = open_remote(f"http://127.0.0.1:{port}/{shards.root.name}")
    stop(server)
    found: list[Any] = []
    reading = threading.Thread(target=lambda: found.append(content(remote)))
    reading.start()
    time.sleep(0.3)
    server = start(state, shards.root.parent, port)
    reading.join(30)
    stop(server)
    assert found == [content(shards)]


def test_a_server_that_does_not_come_back(
    shards: ShardSet, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TRY_FOR", 0.3)
    server = start(Server("", Counter()), shards.root.parent)
    url = f"http://127.0.0.1:{server.server_address[1]}/{shards.root.name}"
    remote = open_remote(url)
    stop(server)
    with pytest.raises(UserError, match=r"series-000000.tar: the download failed \(.*refused"):
        content(remote)
    with pytest.raises(UserError, match=r"index.json: the download failed \(.*refused"):
        open_remote(url)


def test_missing_and_changed_files(far: Server, cache: Cache) -> None:
    with pytest.raises(UserError) as caught:
        open_remote(f"{far.url}-not")
    assert str(caught.value) == f"{far.url}-not/index.json: 404 File not found"
    assert far.asked["index.json"] == 1, "it is not retried"
    remote = open_remote(far.url)
    far.answer = {"series-000002.tar": ["changed"], "series-000003.tar": [404]}
    with pytest.raises(UserError, match=r"series-000002.tar: its SHA-256 differs from index.json"):
        open_shard(remote, remote.shards[2])
    with pytest.raises(UserError, match=r"series-000003.tar: 404"):
        open_shard(remote, remote.shards[3])
    assert not list(cache.folder.glob("*/*.tmp")) and tars(cache) == set()


def test_the_cache_stays_within_its_size_and_spares_open_shards(
    far: Server, cache: Cache, shards: ShardSet
) -> None:
    a, b, c, d = shards.shards
    small = Cache(cache.folder, b.bytes + c.bytes + d.bytes)
    remote = open_remote(far.url, cache=small)

    def use(entry: Any) -> int:
        file = open_shard(remote, entry, small)
        held = sum(f.stat().st_size for f in cache.folder.glob("*/*.tar"))
        assert held <= small.limit
        return file

    first = use(b)
    for entry in (c, d, c):
        os.close(use(entry))
        time.sleep(0.02)  # so that the times of use differ
    os.close(use(a))
    assert tars(cache) == {f"{e.name}.tar" for e in (a, b, c)}, "d was the least recently used"
    os.close(use(d))
    os.close(first)
    os.close(use(a))
    assert far.asked[f"{b.name}.tar"] == 1, "it was open"


def test_open_shards_beyond_the_size_are_logged(
    far: Server, cache: Cache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    remote = open_remote(far.url)
    small = Cache(cache.folder, remote.shards[0].bytes)
    files = [open_shard(remote, entry, small) for entry in remote.shards[:2]]
    assert "the same shards will be downloaded repeatedly" in caplog.text
    assert len(tars(cache)) == 2
    for file in files:
        os.close(file)


def fetch_all(url: str, folder: str, start: Any) -> str:
    os.environ["D2V_CACHE"] = folder
    start.wait()
    return hashlib.sha256(repr(content(open_remote(url))).encode()).hexdigest()


def test_processes_of_a_node_download_once(far: Server, cache: Cache, shards: ShardSet) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(3) as pool:
        barrier = manager.Barrier(3)
        arguments = [(far.url, str(cache.folder), barrier)] * 3
        found = pool.starmap(fetch_all, arguments)
    assert found == [hashlib.sha256(repr(content(shards)).encode()).hexdigest()] * 3
    assert {far.asked[f"{e.name}.tar"] for e in shards.shards} == {1}
    assert {far.asked[f"{e.name}.idx"] for e in shards.shards} == {1}


def test_the_file_of_a_killed_download_is_removed(far: Server, cache: Cache) -> None:
    remote = open_remote(far.url)
    left = remote.root / "series-000003.tar.tmp"
    left.write_bytes(bytes(10_000))
    os.close(open_shard(remote, remote.shards[0]))
    assert not left.exists()


def test_a_command_instead_of_a_url(shards: ShardSet, cache: Cache) -> None:
    where = f"pipe:cat {shards.root}/{{}}"
    assert content(find_set(where)) == content(shards)
    with pytest.raises(UserError, match=r"needs {} where the file name belongs"):
        find_set("pipe:cat x")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scheme_that_this_program_registered(
    shards: ShardSet, cache: Cache, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Workers know it as well, although they do not run the main script."""
    from webdataset.gopen import gopen_schemes

    monkeypatch.setitem(gopen_schemes, "tape", tape)
    monkeypatch.setattr("d2v_ds.loader.loader.prefetch", lambda *given: None)
    found = find_set(f"tape://{shards.root}")
    settings: dict[str, Any] = {"seed": 1, "size": 800, "micro_batches": 2}
    with closing(Loader(found, series_modality(), workers=workers, **settings)) as loader:  # type: ignore[arg-type]
        keys = [k for step in islice(loader, loader.stats.steps) for k in keys_of(step)]
    assert sorted(keys) == sorted(key for key, _ in read_samples(shards, ()))


def keys_of(step: Any) -> list[str]:
    return [key for batch in step.micro_batches for key in batch.keys]


def test_a_command_that_fails(
    shards: ShardSet, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TRY_FOR", 0.1)
    with pytest.raises(UserError, match=r"the download failed \(.*exit code 3"):
        find_set("pipe:exit 3 {}")


def test_a_set_read_by_fsspec(shards: ShardSet, cache: Cache) -> None:
    pytest.importorskip("fsspec")
    assert content(find_set(f"file://{shards.root}")) == content(shards)
    with pytest.raises(UserError, match=r"nowhere/index.json: not found"):
        find_set("file:///nowhere")
    with pytest.raises(UserError, match=r"index.json: what:// requires fsspec and its package for"):
        find_set("what://bucket/set")


def test_a_cache_that_cannot_be_written(
    far: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"D2V_CACHE: cannot write .*file"):
        open_remote(far.url)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # unclosed files
def test_plain_webdataset_reads_our_shards(shards: ShardSet) -> None:
    import webdataset

    urls = [str(shards.tar(entry)) for entry in shards.shards]
    theirs = [
        (sample["__key__"], {"series": sample["series"], "json": sample["json"]})
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    assert theirs == content(shards)
