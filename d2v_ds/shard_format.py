"""The earlier name of `d2v_ds.data.shard_format`, for programs that import it."""

from d2v_ds.data.shard_format import ShardEntry, ShardSet, fingerprint, open_set, set_json
from d2v_ds.data.shard_index import ShardIndex, index_bytes, read_index

__all__ = [
    "ShardEntry",
    "ShardIndex",
    "ShardSet",
    "fingerprint",
    "index_bytes",
    "open_set",
    "read_index",
    "set_json",
]
