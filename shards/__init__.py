"""Converters from corpora to shard sets: one file a corpus family, and the writer."""
