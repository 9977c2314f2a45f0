"""The base class of all speech layouts, which depend on no option."""

from __future__ import annotations

from shards.layout import Layout

# Extensions of what libsndfile reads, common ones first. Raw samples have no header; .mat, .mpc,
# .iff and .htk files usually hold something else.
AUDIO = (
    *(".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aiff", ".aif", ".aifc", ".au", ".snd"),
    *(".caf", ".w64", ".rf64", ".bwf", ".wave", ".sph", ".nist", ".voc", ".mp2", ".mp1", ".sf"),
    *(".ircam", ".avr", ".paf", ".pvf", ".svx", ".8svx", ".16svx", ".sds", ".wve"),
)
# Recordings that libsndfile does not read.
FOREIGN = (
    *(".m4a", ".m4b", ".mp4", ".aac", ".webm", ".mkv", ".mka", ".mov", ".wma", ".amr", ".3gp"),
    *(".ape", ".wv", ".shn", ".ac3", ".spx"),
)

SpeechLayout = Layout[None, bytes]  # an item holds an encoded recording
