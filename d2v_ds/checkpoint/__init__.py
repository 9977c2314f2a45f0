"""Checkpoints: the whole state of a run, by parameter name and offset, verified before it is used.

    engine.partitions(), EMA, state --Saver--> checkpoints/STEP/ --newest_verified--> Checkpoint
        --restore--> the partitions of any other engine    --tensors--> whole tensors for export

    checkpoints/00000600/
      rank00000.safetensors ...   flat fp32 pieces, named KIND/PARAMETER
      manifest.json               each file's size, SHA-256 and pieces; shapes; Adam's steps; state
      COMPLETE                    the SHA-256 of manifest.json; written last

A piece is (parameter name, offset of its first element in the flattened parameter, values). Nothing
depends on the number of ranks, the ZeRO stage or the precision: a run resumes under any of them,
and reading needs neither DeepSpeed nor the model. Files are safetensors and JSON, so nothing is
ever unpickled.

A checkpoint is written to checkpoints/.STEP.GENERATION.tmp and renamed once the files of all ranks
are on disk, so a crash at any time leaves the earlier checkpoints intact. If the run ends by an
error before the renaming, the complete checkpoint is published then, or by the next start.
"""

from d2v_ds.checkpoint.format import CannotSave, DamagedCheckpoint, Shapes, StateKind
from d2v_ds.checkpoint.read import Checkpoint, newest_verified, open_checkpoint, open_verified
from d2v_ds.checkpoint.recover import clean
from d2v_ds.checkpoint.saver import Saver
from d2v_ds.checkpoint.write import publish

__all__ = [
    "CannotSave",
    "Checkpoint",
    "DamagedCheckpoint",
    "Saver",
    "Shapes",
    "StateKind",
    "clean",
    "newest_verified",
    "open_checkpoint",
    "open_verified",
    "publish",
]
