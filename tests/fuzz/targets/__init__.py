"""The targets, by name. Each module has those of one kind of input."""

from __future__ import annotations

from tests.fuzz.harness import Target
from tests.fuzz.targets import corpora, parquet, runs, samples, sets, settings, tars, weights

MODULES = (sets, tars, samples, corpora, parquet, settings, runs, weights)
TARGETS: dict[str, Target] = {
    target.name: target for module in MODULES for target in module.TARGETS
}
