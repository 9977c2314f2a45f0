"""The tiny recipes learn from the embedded corpora: short runs without signs of collapse, whole ones
whose features tell more of labels than those of the untrained encoder."""

from __future__ import annotations
