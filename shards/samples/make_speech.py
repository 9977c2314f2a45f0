"""Creates samples/speech, a subset of the Free Spoken Digit Dataset as FLAC with three manifests.

    python -m shards.samples.make_speech FSDD [OUT]      # FSDD: the folder with recordings/

The recordings (8 kHz, 16 bit) are stored losslessly. The same input gives the same manifests, and
with the same version of libFLAC the same files.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from d2v_ds.data import audio

LIMIT = 2_000_000  # bytes, over all files

# Training recordings per speaker and digit, starting with index 5. The recordings of nicolas are a
# quarter of the size of the first three speakers' recordings, so there are more of them.
TRAIN = {"george": 6, "jackson": 6, "lucas": 6, "yweweler": 9, "nicolas": 21}
SEEN = 1  # recordings per training speaker and digit, starting with index 0
UNSEEN = {"theo": 10}  # recordings per digit of a speaker that is not in the training data


def splits() -> dict[str, list[tuple[int, str, int]]]:
    """{manifest: [(digit, speaker, index) of every recording]}."""
    digits = range(10)
    return {
        "train": [(d, s, i) for s, n in TRAIN.items() for d in digits for i in range(5, 5 + n)],
        "seen": [(d, s, i) for s in TRAIN for d in digits for i in range(SEEN)],
        "unseen": [(d, s, i) for s, n in UNSEEN.items() for d in digits for i in range(n)],
    }


def make(source: Path, out: Path) -> int:
    """Writes recordings/ and the manifests to `out`; returns the bytes of all files in it."""
    recordings = out / "recordings"
    shutil.rmtree(recordings, ignore_errors=True)
    recordings.mkdir(parents=True)
    for split, chosen in splits().items():
        rows = ["path\tlabel\tspeaker\n"]
        for digit, speaker, index in chosen:
            name = f"{digit}_{speaker}_{index}"
            wav = source / "recordings" / f"{name}.wav"
            samples = audio.to_int16(audio.decode(wav))
            flac = audio.encode_flac(samples, audio.info(wav).rate, level=8)
            (recordings / f"{name}.flac").write_bytes(flac)
            rows.append(f"recordings/{name}.flac\t{digit}\t{speaker}\n")
        (out / f"{split}.tsv").write_text("".join(rows))
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent / "speech")
    arguments = parser.parse_args()
    size = make(arguments.source, arguments.out)
    assert size <= LIMIT, f"{size} bytes, the limit is {LIMIT}"
    print(f"{size} bytes in {arguments.out}")
