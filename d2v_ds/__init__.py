"""Pre-training of data2vec for speech, images and text with DeepSpeed ZeRO."""

__version__ = "0.1.0"
