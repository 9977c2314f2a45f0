"""The command d2v-shards: converters from corpora to shard sets, one package per corpus family."""
