"""Fine-tuning: an encoder and a head learn labels, in the same loop as pre-training.

settings.py   init and the training set --> the settings that a recipe leaves open
labels.py     labels of samples <-> numbers
labelled.py   a modality whose samples have labels
mixing.py     mixup, CutMix and random erasing
heads.py      tokens [B, T, D] --> logits
task.py       the task: encoder, head, loss, outcomes of a validation
"""

from d2v_ds.finetune.task import Finetune

__all__ = ["Finetune"]
