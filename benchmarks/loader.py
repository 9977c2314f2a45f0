"""Compares the loader with other loaders on the same samples and prints tables.

    python benchmarks/loader.py [--quick] [raw] [whole] [plan] [workers]

All data are synthetic: noise that resembles speech (syllables, pauses) as WAV and FLAC, images of
blobs and edges as JPEG files of about 57 KB, and text with natural word frequencies; `workers` uses
the bundled corpora as well. They are in the page cache, so the results measure CPU cost, not disk
speed.

Rates are samples per second of CPU time (user and system, including worker processes). The variants
of a table are interleaved in one process, and the best round counts. On a busy machine the ratios
within a table remain meaningful, the rates do not. litdata and MosaicML streaming are measured if
they are installed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import soundfile
import torch
import webdataset
from loader_workers import compare, cpu_of
from PIL import Image
from synthetic import BLOCK, RATE, Corpora, make_corpora, utterance_seconds
from torch.utils.data import DataLoader

from d2v_ds.data import images
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.plan import BatchPlan
from d2v_ds.loader.reading import Reader
from d2v_ds.modalities.speech import Speech, SpeechConfig
from d2v_ds.modalities.text import Text, TextConfig
from d2v_ds.modalities.vision import Vision, VisionConfig

# -------------------------------------------------------------------------------------- measuring

Variant = Callable[[], tuple[float, float]]  # -> (samples, CPU seconds)


def timed(work: Callable[[], float]) -> tuple[float, float]:
    start = time.process_time()
    samples = work()
    return samples, time.process_time() - start


def race(title: str, variants: dict[str, Variant], base: str, wanted: dict[str, str]) -> None:
    """Prints samples per second of CPU time and the ratio to `base`. wanted: targets by variant."""
    best = dict.fromkeys(variants, 0.0)
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            samples, seconds = variant()
            best[name] = max(best[name], samples / seconds)
    print(f"\n{title}", flush=True)
    for name, rate in best.items():
        print(f"  {name:<44}{rate:>10,.0f} /s{rate / best[base]:>8.2f}x  {wanted.get(name, '')}")


ROUNDS = 5


def settled(pids: list[int]) -> list[int]:
    """Waits until these processes have filled their queues, so that every measurement begins and
    ends with full queues. Returns `pids`."""
    before = -1.0
    while pids and (now := cpu_of(pids)) > before:
        before = now
        time.sleep(0.15)
    return pids


# ----------------------------------------------------------------------------------- raw reading


def urls(shards: ShardSet) -> list[str]:
    return [str(shards.tar(entry)) for entry in shards.shards]


def race_reading(name: str, shards: ShardSet, root: Path) -> None:
    order = np.random.default_rng(0).permutation(shards.samples).tolist()
    repeats = max(1, 400 // shards.samples)

    def ours(verify: bool) -> Variant:
        reader = Reader(shards, shards.fields, verify)
        reader.read(0)

        def work() -> float:
            for sample_id in order * repeats:
                reader.read(sample_id)
            return len(order) * repeats

        return lambda: timed(work)

    buffer = bytearray(max(entry.bytes for entry in shards.shards))

    def copy() -> float:
        for _ in range(repeats):
            for tar in urls(shards):
                with open(tar, "rb", buffering=0) as file:
                    file.readinto(buffer)
        return len(order) * repeats

    def theirs() -> float:
        found = 0
        for _ in range(repeats):
            for _sample in webdataset.WebDataset(urls(shards), shardshuffle=False):
                found += 1
        return found

    variants: dict[str, Variant] = {
        "webdataset": lambda: timed(theirs),
        "ours, checksums, random order": ours(True),
        "ours, no checksums, random order": ours(False),
        "copying the whole files": lambda: timed(copy),
    }
    for peer in (litdata_reading, streaming_reading):
        variants |= peer(shards, root / f"{peer.__name__}-{name}", repeats)
    race(f"raw reading, {name}", variants, "webdataset", {})


def payloads(shards: ShardSet) -> list[bytes]:
    with closing(Reader(shards, shards.fields)) as reader:
        return [next(iter(reader.read(i).values())) for i in range(shards.samples)]


def litdata_reading(shards: ShardSet, root: Path, repeats: int) -> dict[str, Variant]:
    try:
        from litdata import StreamingDataset
        from litdata.streaming.writer import BinaryWriter
    except ImportError:
        return {}
    writer = BinaryWriter(str(root), chunk_bytes="64MB")
    for i, payload in enumerate(payloads(shards)):
        writer[i] = {"data": payload}
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(root), shuffle=False)

    def work() -> float:
        return sum(1 for _ in range(repeats) for _sample in dataset)

    return {"litdata": lambda: timed(work)}


def streaming_reading(shards: ShardSet, root: Path, repeats: int) -> dict[str, Variant]:
    try:
        from streaming import MDSWriter, StreamingDataset
    except ImportError:
        return {}
    with MDSWriter(out=str(root), columns={"data": "bytes"}, size_limit="64mb") as writer:
        for payload in payloads(shards):
            writer.write({"data": payload})
    dataset = StreamingDataset(local=str(root), shuffle=False, batch_size=1)

    def work() -> float:
        for _ in range(repeats):
            for i in range(len(dataset)):
                dataset[i]
        return len(dataset) * repeats

    return {"MosaicML streaming, by index": lambda: timed(work)}


# ---------------------------------------------------------------------------------- whole loader


def our_loader(shards: ShardSet, modality: Any, size: float, workers: int, samples: int) -> Variant:
    """Reads `samples` samples from an endless loader."""
    loader = Loader(shards, modality, seed=0, size=size, micro_batches=1, workers=workers)
    next(loader)

    def run() -> tuple[float, float]:
        pids = settled(loader.workers.pids if loader.workers else [])
        start, found = time.process_time() + cpu_of(pids), 0
        while found < samples:
            found += next(loader).samples
        return found, time.process_time() + cpu_of(settled(pids)) - start

    return run


class Theirs:
    """The pipeline of webdataset with the usual decoding. Batches include masks, like ours."""

    def __init__(self, shards: ShardSet, modality: Any, decode: Callable[..., Any], together: int):
        self.modality, self.rng = modality, np.random.default_rng(0)
        self.decode, self.together = decode, together
        self.data = webdataset.WebDataset(urls(shards), shardshuffle=False).shuffle(64)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        examples: list[Any] = []
        for sample in itertools.chain.from_iterable(itertools.repeat(self.data)):
            examples.append(self.decode(sample, self.rng))
            if len(examples) == self.together:
                rngs = [self.rng] * len(examples)
                yield len(examples), self.modality.collate(examples, rngs, 0).inputs
                examples = []


class Pipeline(torch.utils.data.IterableDataset[Any]):
    def __init__(self, theirs: Theirs) -> None:
        self.theirs = theirs

    def __iter__(self) -> Iterator[Any]:
        return iter(self.theirs)


def their_loader(theirs: Theirs, workers: int, samples: int) -> Variant:
    loader = DataLoader(Pipeline(theirs), batch_size=None, num_workers=workers)
    batches: Any = iter(loader)
    next(batches)

    def run() -> tuple[float, float]:
        pids = settled([worker.pid for worker in getattr(batches, "_workers", [])])
        start, found = time.process_time() + cpu_of(pids), 0
        while found < samples:
            found += next(batches)[0]
        return found, time.process_time() + cpu_of(settled(pids)) - start

    return run


def usual_audio(kind: str, crop: int) -> Callable[..., Any]:
    """Decodes the whole file to float32 with soundfile, applies layer norm, and crops randomly."""

    def decode(sample: dict[str, Any], rng: np.random.Generator) -> Any:
        waveform = torch.from_numpy(soundfile.read(io.BytesIO(sample[kind]), dtype="float32")[0])
        waveform = torch.nn.functional.layer_norm(waveform, waveform.shape)
        start = int(rng.integers(max(1, len(waveform) - crop + 1)))
        return waveform[start : start + crop].numpy()

    return decode


def usual_picture(sample: dict[str, Any], rng: np.random.Generator) -> Any:
    """Decodes the whole image, crops and resizes it (bicubic) with Pillow, normalises in numpy."""
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    for _ in range(10):
        area, ratio = rng.uniform(0.2, 1) * 500 * 375, np.exp(rng.uniform(-0.2877, 0.2877))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if w <= 500 and h <= 375:
            break
    left, top = rng.integers(500 - min(w, 500) + 1), rng.integers(375 - min(h, 375) + 1)
    image = image.crop((left, top, left + w, top + h)).resize((224, 224), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = (np.asarray(image, np.float32) / 255 - images.MEAN) / images.STD
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def race_loaders(corpora: Corpora, workers: int) -> None:
    def speech(crop: float) -> Speech:
        return Speech(SpeechConfig(views=1, crop_seconds=crop, min_seconds=1.0))

    kinds: list[tuple[str, ShardSet, Any, Callable[..., Any], int, float, int, str]] = [
        ("WAV, crops of 10 s", corpora.wav, speech(10), usual_audio("wav", 160_000), 16, 160, 300,
         "target: 2"),
        ("FLAC, crops of 20 s", corpora.flac, speech(20), usual_audio("flac", 320_000), 8, 160, 100,
         "target: 1"),
        ("FLAC of 2 min, crops of 3 s", corpora.long, speech(3), usual_audio("flac", 48_000), 8, 24,
         16, "target: 2"),
        ("JPEG, crops of 224", corpora.jpg, Vision(VisionConfig(views=1)), usual_picture, 32, 32,
         128, "target: 2"),
    ]  # fmt: skip
    for title, shards, modality, decode, together, size, samples, wanted in kinds:
        variants = {
            "webdataset, usual decoding": their_loader(
                Theirs(shards, modality, decode, together), workers, samples
            ),
            "ours": our_loader(shards, modality, size, workers, samples),
        }
        where = f"{workers} worker process" if workers else "in one process"
        race(f"whole loader, {title}, {where}", variants, next(iter(variants)), {"ours": wanted})


def race_text(corpora: Corpora) -> None:
    """Batches of 64 blocks: stored token ids compared with tokenising on the fly."""
    modality = Text(TextConfig(views=1))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(corpora.tokenizer))

    def on_the_fly() -> float:
        ids: list[int] = []
        blocks: list[Any] = []
        batches = 0
        for sample in webdataset.WebDataset([str(corpora.text)], shardshuffle=False):
            ids += [*processor.encode(sample["txt"].decode()), 2]
            while len(ids) >= BLOCK:
                blocks.append(np.array(ids[:BLOCK]))
                del ids[:BLOCK]
            if len(blocks) >= 64:
                torch.from_numpy(np.stack(blocks[:64]))
                del blocks[:64]
                batches += 1
                if batches == 2:
                    break
        return batches * 64

    loader = Loader(corpora.blocks, modality, seed=0, size=64 * BLOCK, micro_batches=1)
    next(loader)
    reader = Reader(corpora.blocks, ["u16"])
    order = np.random.default_rng(0).permutation(corpora.blocks.samples)[:640].tolist()

    def unmasked() -> float:
        for start in range(0, len(order), 64):
            blocks = [modality.decode(reader.read(i), None) for i in order[start : start + 64]]
            torch.from_numpy(np.stack(blocks))
        return len(order)

    def masked() -> float:
        return sum(next(loader).samples for _ in range(4))

    race(
        "text, batches of 64 blocks of 512 tokens",
        {
            "webdataset, tokenising on the fly, no masks": lambda: timed(on_the_fly),
            "ours, random blocks, no masks": lambda: timed(unmasked),
            "ours, the loader with masks": lambda: timed(masked),
        },
        "webdataset, tokenising on the fly, no masks",
        {"ours, random blocks, no masks": "target: 100"},
    )


# ------------------------------------------------------------------------------------------- plan


def show_plan() -> None:
    """Padding, lost audio and quality of shuffling, for 200,000 lengths."""
    rng = np.random.default_rng(0)
    lengths = np.array_split((utterance_seconds(200_000, rng) * RATE).astype(np.uint32), 100)
    modality = Speech(SpeechConfig())
    start = time.process_time()
    plan = BatchPlan(lengths, modality, seed=0, size=1000, micro_batches=16)
    made = time.process_time() - start
    stats = plan.stats()
    cropped = np.minimum(np.concatenate(lengths), modality.max_samples)
    usable = cropped[cropped >= modality.min_samples]
    shuffled = rng.permutation(usable)
    batches = [shuffled[i : i + 6] for i in range(0, len(shuffled), 6)]
    padded = sum(int(batch.max()) * len(batch) for batch in batches)
    shortest = sum(int(batch.min()) * len(batch) for batch in batches)
    print("\npadding and lost audio, 200,000 utterances, micro-batches of 62.5 s")
    print(
        f"  random batches: {1 - usable.sum() / padded:.1%} padding; cropped to the shortest, "
        f"{1 - shortest / usable.sum():.1%} of the audio is lost"
    )
    print(
        f"  planned batches: {stats.padding:.2%} padding; an epoch of {stats.steps} steps has "
        f"{stats.units / (usable.sum() / RATE):.4%} of the audio (after the crop to 20 s)"
    )
    orders = []
    for epoch in range(2):
        steps = itertools.takewhile(
            lambda step, epoch=epoch: step.epoch == epoch,  # type: ignore[misc]
            plan.steps({"epoch": epoch, "step": 0, "pool": 0, "pool_step": 0}),
        )
        orders.append(np.concatenate([lot for step in steps for lot in step.lots]))
    ranks = [np.argsort(order) for order in orders]
    print(f"  planning: {made:.2f} s of CPU time")
    start = time.process_time()
    middle = {"epoch": 7, "step": 2000, "pool": len(plan.pools) // 2, "pool_step": 3}
    next(plan.steps(middle))
    print(f"  seeking to the middle of an epoch: {time.process_time() - start:.3f} s of CPU time")
    correlation = np.atleast_2d(np.corrcoef([*ranks, np.arange(len(ranks[0]))]))
    print(
        "  shuffling: the rank correlation of the order of samples is "
        f"{correlation[0, 1]:+.4f} between two epochs, "
        f"{correlation[0, 2]:+.4f} between epoch and set"
    )


def race_all(corpora: Corpora, parts: list[str], root: Path) -> None:
    if "raw" in parts:
        for name in ("wav", "flac", "jpg"):
            race_reading(name, getattr(corpora, name), root)
    if "whole" in parts:
        for workers in (0, 1):
            race_loaders(corpora, workers)
        race_text(corpora)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["raw", "whole", "plan", "workers"])
    parser.add_argument("--quick", action="store_true", help="less data and fewer rounds")
    arguments = parser.parse_args()
    global ROUNDS
    ROUNDS = 2 if arguments.quick else 7
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="d2v-loader-"))
    scale = 0.25 if arguments.quick else 1.0
    try:
        if {"raw", "whole"} & set(arguments.parts):
            race_all(make_corpora(root, scale), arguments.parts, root)
        if "plan" in arguments.parts:
            show_plan()
        if "workers" in arguments.parts:
            compare(root / "workers", scale, ROUNDS // 2 + 1)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
