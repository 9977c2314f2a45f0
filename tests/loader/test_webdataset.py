"""The webdataset pipeline gives the same samples as the project's reader; damaged tars."""

from __future__ import annotations

import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

import d2v_ds
from d2v_ds.data import download
from d2v_ds.data.shard_format import ShardSet, open_set
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set
from d2v_ds.loader.reading import read_samples
from d2v_ds.modalities.base import Modality
from d2v_ds.modalities.speech import Speech, SpeechConfig
from d2v_ds.modalities.text import Text, TextConfig
from d2v_ds.modalities.vision import Vision, VisionConfig
from shards import samples
from shards.cli import main
from tests.helpers.corpora import put_tar, recording
from tests.helpers.http_server import Server, start, stop

CORPORA: dict[str, list[Any]] = {
    "speech": ["speech", samples.path("speech") / "unseen.tsv", "--shard-size", "100KB"],
    "vision": ["images", samples.path("images") / "unseen", "--shard-size", "100KB"],
    "text": ["text", samples.path("text") / "train.txt.gz", "--block", "128"],
}
CORPORA["text"] += ["--tokenizer", samples.path("text") / "tokenizer.model"]
MODALITIES: dict[str, Modality] = {
    "speech": Speech(SpeechConfig()),
    "vision": Vision(VisionConfig(image_size=32, patch_size=4)),
    "text": Text(TextConfig(vocab_size=4096, mask_id=4095, max_tokens=128)),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    root = tmp_path_factory.mktemp("sets")
    for modality, (family, source, *options) in CORPORA.items():
        assert main([family, str(source), str(root / modality), "-j1", *map(str, options)]) == 0
    return {modality: open_set(root / modality) for modality in CORPORA}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE", 0.02)
    return tmp_path / "cache"


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Server]]:
    servers = []

    def serve(folder: Path) -> Server:
        state = Server("", Counter())
        servers.append(start(state, folder))
        state.url = f"http://127.0.0.1:{servers[-1].server_address[1]}"
        return state

    yield serve
    for server in servers:
        stop(server)


def assert_as_reader(items: Iterable[dict[str, Any]], shards: ShardSet) -> None:
    """The items equal those of our reader and decoder: keys, members, examples and order."""
    modality = MODALITIES[shards.modality]
    found, expected = list(items), list(read_samples(shards, shards.fields))
    assert [item["__key__"] for item in found] == [key for key, _ in expected]
    assert len(found) == shards.samples > 1
    for item, (_, members) in zip(found, expected, strict=True):
        assert {name: item[name] for name in members} == members
        example = modality.decode(members, None)
        assert item["example"].dtype == example.dtype
        np.testing.assert_array_equal(item["example"], example)


@pytest.mark.parametrize("name", CORPORA)
def test_a_local_set(sets: dict[str, ShardSet], name: str) -> None:
    shards = sets[name]
    assert_as_reader(d2v_ds.webdataset(shards.root, MODALITIES[name]), shards)
    assert_as_reader(d2v_ds.webdataset(shards, MODALITIES[name]), shards)


@pytest.mark.parametrize("name", CORPORA)
def test_remote_sets(
    sets: dict[str, ShardSet], name: str, serve: Callable[[Path], Server], cache: Path
) -> None:
    shards = sets[name]
    far = serve(shards.root)
    far.answer = {f"{shards.shards[0].name}.tar": ["short", 503]}
    assert_as_reader(d2v_ds.webdataset(far.url, MODALITIES[name]), shards)
    shutil.rmtree(cache)
    where = f"pipe:cat {shards.root}/{{}}"
    assert_as_reader(d2v_ds.webdataset(where, MODALITIES[name]), shards)


@pytest.mark.parametrize("name", CORPORA)
def test_tars_at_urls(
    sets: dict[str, ShardSet], name: str, serve: Callable[[Path], Server], cache: Path
) -> None:
    """Without an index. Packed blocks are recognised by their two dimensions."""
    shards = sets[name]
    pattern = f"{shards.shards[0].name[:-1]}{{0..{len(shards.shards) - 1}}}.tar"
    for where in (f"{serve(shards.root).url}/{pattern}", f"pipe:cat {shards.root}/{pattern}"):
        assert_as_reader(d2v_ds.webdataset(where, MODALITIES[name]), shards)
    assert not list(cache.glob("own/*/")), "downloads are removed"


def third_party(folder: Path) -> Path:
    for t in range(3):
        named = [(f"a/{t}{i}.wav", recording(seconds=0.2 + i / 50, seed=i)) for i in range(60)]
        named += [(f"a/{t}{i}.json", b"{}") for i in range(60)]
        put_tar(folder / f"part-{t}.tar", sorted(named))
    put_tar(folder / "part-1.tar", [*sorted(named), ("b.txt", b"without a recording")])
    return folder


def test_third_party_tars(tmp_path: Path) -> None:
    """The pipeline leaves out the same samples as the index."""
    folder = third_party(tmp_path / "tars")
    pipeline = d2v_ds.webdataset(folder, "speech")
    shards = find_set(folder, "speech")
    assert shards.samples == 180
    assert_as_reader(pipeline, shards)


def test_without_decoding(sets: dict[str, ShardSet]) -> None:
    for name, shards in sets.items():
        [first, *_] = d2v_ds.webdataset(shards, name, decode=False)
        key, members = next(read_samples(shards, shards.fields))
        url = str(shards.tar(shards.shards[0]))
        assert first == {"__key__": key, "__url__": url, **members}


def test_settings_of_another_tokenizer(sets: dict[str, ShardSet]) -> None:
    with pytest.raises(UserError, match=r"modality.text.vocab_size=4096"):
        d2v_ds.webdataset(sets["text"], "text")


# ---------------------------------------------------------------------------- passes and processes


def keys_of(items: Iterable[dict[str, Any]]) -> list[str]:
    return [item["__key__"] for item in items]


def key_of(item: dict[str, Any]) -> str:
    key: str = item["__key__"]
    return key


@pytest.mark.parametrize("shuffle", [0, 20])
@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_of_a_data_loader(sets: dict[str, ShardSet], shuffle: int, context: str) -> None:
    """Two workers read every sample once; webdataset's own methods are available."""
    shards = sets["speech"]
    assert len(shards.shards) > 2
    pipeline: Any = d2v_ds.webdataset(shards, "speech", shuffle=shuffle).map(key_of)
    loader: Any = DataLoader(
        pipeline.batched(7, collation_fn=list),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=context,
    )
    found = [key for batch in loader for key in batch]
    assert sorted(found) == sorted(key for key, _ in read_samples(shards, ()))


def test_each_rank_reads_its_own_tars(
    sets: dict[str, ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        found.append(keys_of(d2v_ds.webdataset(sets["vision"], "vision", decode=False)))
    expected = [key for key, _ in read_samples(sets["vision"], ())]
    assert all(found) and sorted(found[0] + found[1]) == sorted(expected)


def test_shuffling(sets: dict[str, ShardSet]) -> None:
    pipeline = d2v_ds.webdataset(sets["vision"], "vision", decode=False, shuffle=50)
    first, second = keys_of(pipeline), keys_of(pipeline)
    ordered = [key for key, _ in read_samples(sets["vision"], ())]
    assert first != ordered != second != first
    assert sorted(first) == sorted(second) == sorted(ordered)
    again = d2v_ds.webdataset(sets["vision"], "vision", decode=False, shuffle=50)
    assert keys_of(again) == first
    other = d2v_ds.webdataset(sets["vision"], "vision", decode=False, shuffle=50, seed=1)
    assert keys_of(other) != first


# ------------------------------------------------------------------------------------------ damage


def copied(shards: ShardSet, root: Path) -> tuple[ShardSet, Path]:
    """A copy of a set and the path of its second tar."""
    found = open_set(shutil.copytree(shards.root, root / "copy"))
    return found, found.tar(found.shards[1])


def harm(tar: Path, what: str) -> None:
    """Damages the middle of a tar; webdataset itself would silently stop reading there."""
    content = bytearray(tar.read_bytes())
    header = content.index(b"ustar", len(content) // 2) - 257
    if what == "header":
        content[header] ^= 1
    elif what == "zeros":
        content[header : header + 512] = bytes(512)
    else:
        del content[header:]
    tar.write_bytes(content)


@pytest.mark.parametrize("what", ["header", "zeros", "cut"])
def test_a_damaged_tar_of_a_set(sets: dict[str, ShardSet], tmp_path: Path, what: str) -> None:
    shards, tar = copied(sets["speech"], tmp_path)
    harm(tar, what)
    with pytest.raises(UserError, match=rf"{tar}: is damaged \(.* at byte \d+\); copy it"):
        list(d2v_ds.webdataset(shards, "speech"))


def test_links_of_indexed_tars(tmp_path: Path) -> None:
    """webdataset itself skips them."""
    tar = put_tar(tmp_path / "in/a.tar", [("a.wav", recording()), ("b.wav", recording(seed=1))])
    with tarfile.open(tar, "a") as file:
        link = tarfile.TarInfo("c.wav")
        link.type, link.linkname = tarfile.LNKTYPE, "a.wav"
        file.addfile(link)
    for _ in range(2):  # without an index, then with one
        items = list(d2v_ds.webdataset(str(tmp_path / "in"), "speech"))
        assert [item["__key__"] for item in items] == ["a", "b", "c"]
        assert items[2]["wav"] == items[0]["wav"] and len(items[2]["example"]) == 4800


def test_a_handler_skips_the_rest_of_a_damaged_tar(
    sets: dict[str, ShardSet], tmp_path: Path
) -> None:
    shards, tar = copied(sets["speech"], tmp_path)
    harm(tar, "header")
    errors: list[Exception] = []

    def keep(error: Exception) -> bool:
        errors.append(error)
        return True

    found = list(d2v_ds.webdataset(shards, "speech", handler=keep))
    assert len(errors) == 1 and 0 < len(found) < shards.samples
    assert found[-1]["__url__"] == str(shards.tar(shards.shards[-1]))
    errors.clear()
    found = list(d2v_ds.webdataset(shards, "speech", handler=lambda error: False))
    assert {item["__url__"] for item in found} <= {str(shards.tar(e)) for e in shards.shards[:2]}


@pytest.mark.parametrize("what", ["header", "zeros", "cut"])
def test_a_damaged_tar_at_a_url(
    sets: dict[str, ShardSet], tmp_path: Path, what: str, serve: Callable[[Path], Server]
) -> None:
    _, tar = copied(sets["speech"], tmp_path)
    harm(tar, what)
    url = f"{serve(tar.parent).url}/{tar.name}"
    with pytest.raises(UserError, match=rf"{url}: .* at byte \d+; copy it again"):
        list(d2v_ds.webdataset(url, "speech"))


def test_a_changed_member(sets: dict[str, ShardSet], tmp_path: Path) -> None:
    shards, tar = copied(sets["vision"], tmp_path)
    content = bytearray(tar.read_bytes())
    content[512 + 60] ^= 1  # in the first member
    tar.write_bytes(content)
    with pytest.raises(UserError, match=rf"{tar}, sample '.*': its \.\w+ has changed"):
        list(d2v_ds.webdataset(shards, "vision"))
    errors: list[Exception] = []

    def keep(error: Exception) -> bool:
        errors.append(error)
        return True

    found = list(d2v_ds.webdataset(shards, "vision", handler=keep))
    assert len(found) == shards.samples - 1 and len(errors) == 1


def test_samples_that_cannot_be_decoded(tmp_path: Path, serve: Callable[[Path], Server]) -> None:
    put_tar(tmp_path / "a.tar", [("0.wav", b"RIFF"), ("1.txt", b"x"), ("2.wav", recording())])
    url = f"{serve(tmp_path).url}/a.tar"
    with pytest.raises(UserError, match=rf"{url}, sample '0': is no"):
        list(d2v_ds.webdataset(url, "speech"))
    errors: list[str] = []

    def keep(error: Exception) -> bool:
        errors.append(str(error))
        return True

    assert keys_of(d2v_ds.webdataset(url, "speech", handler=keep)) == ["2"]
    assert errors[1] == f"{url}, sample '1': has only txt, none of flac, wav"


def test_sources_that_are_not_a_set(sets: dict[str, ShardSet], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds text"):
        d2v_ds.webdataset(sets["text"], "speech")
    with pytest.raises(UserError, match="holds text"):
        d2v_ds.webdataset(sets["text"].root, "speech")
    with pytest.raises(UserError, match="no such modality"):
        d2v_ds.webdataset(sets["text"], "texts")
    with pytest.raises(UserError, match="no such shard set"):
        d2v_ds.webdataset(tmp_path / "nowhere", "speech")
    lost = open_set(shutil.copytree(sets["text"].root, tmp_path / "lost"))
    lost.tar(lost.shards[0]).unlink()
    with pytest.raises(UserError, match=r"text-000000.tar: cannot be read \(No such file"):
        list(d2v_ds.webdataset(lost, MODALITIES["text"]))
