"""What all layouts of speech share. Their options do not depend on the command line."""

from __future__ import annotations

from shards.layout import Layout

AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus")

SpeechLayout = Layout[None, bytes]  # an item holds an encoded recording
