"""The base class of all speech layouts, which depend on no option."""

from __future__ import annotations

from shards.layout import Layout

AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus")

SpeechLayout = Layout[None, bytes]  # an item holds an encoded recording
