"""Makes samples/speech from the Free Spoken Digit Dataset: a subset, as FLAC, with three manifests.

    python -m shards.samples.make_speech FSDD [OUT]      # FSDD: the folder with recordings/

The recordings stay as they are (8 kHz, 16 bit), stored losslessly. The same input gives the same
manifests, and with the same libFLAC the same files.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from d2v_ds.data import audio

LIMIT = 2_000_000  # bytes, of everything

# Recordings a digit for training, from index 5 on. A recording of nicolas takes a quarter of the
# bytes of one of the first three, hence so many of his.
TRAIN = {"george": 6, "jackson": 6, "lucas": 6, "yweweler": 9, "nicolas": 21}
SEEN = 1  # a digit of each training speaker, from index 0 on
UNSEEN = {"theo": 10}  # a digit, from index 0 on; never trained on


def splits() -> dict[str, list[tuple[int, str, int]]]:
    """(digit, speaker, index) of every recording, by manifest."""
    digits = range(10)
    return {
        "train": [(d, s, i) for s, n in TRAIN.items() for d in digits for i in range(5, 5 + n)],
        "seen": [(d, s, i) for s in TRAIN for d in digits for i in range(SEEN)],
        "unseen": [(d, s, i) for s, n in UNSEEN.items() for d in digits for i in range(n)],
    }


def make(source: Path, out: Path) -> int:
    """Writes recordings/ and the manifests into `out`; returns the bytes of all of it."""
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
    assert size <= LIMIT, f"{size} bytes are more than {LIMIT}"
    print(f"{size} bytes in {arguments.out}")
