"""The settings of fine-tuning: the section `finetune` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from d2v_ds.config.bounds import Amount, BelowOne, Count, Factor, Positive, PositiveShare, Share

Metric = Literal[
    "accuracy",
    "f1",
    "accuracy_f1",
    "matthews",
    "pearson",
    "spearman",
    "pearson_spearman",
    "wer",
    "cer",
]


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning of an encoder on labelled data, with `d2v-ds finetune`."""

    task: Literal["none", "ctc", "classification", "regression"] = "none"
    """none: the configuration is one of pre-training. ctc: transcripts of speech; classification:
    one class per sample; regression: one number per text."""

    label: str = "label"
    """The key of the label in a sample's .json; for ctc, of its transcript."""

    labels: tuple[str, ...] = ()
    """The outputs of the head in order: the classes, or for ctc the blank and the symbols. Empty:
    collected from the training set when the run starts."""

    tokenizer: str = ""
    """ctc: a sentencepiece model whose pieces are the symbols. Empty: the symbols are letters."""

    metric: Metric | Literal["auto"] = "auto"
    """The metric that decides which checkpoint is best. auto: wer for ctc, accuracy for
    classification, pearson_spearman for regression."""

    patience: Count = 0
    """Validations without a better value after which the run ends; 0: no early stopping."""

    max_seconds: Amount = 0.0
    """ctc: longer recordings are left out, and counted in the log; 0: none."""

    freeze: Literal["nothing", "convolutions", "features", "front_end", "encoder"] = "nothing"
    """What is never trained. convolutions: those of the speech front end; features: the front end
    without its positions and context; front_end: all of it; encoder: everything but the head."""

    freeze_blocks: Count = 0
    """The number of blocks, counted from the input, that are never trained; needs
    freeze=front_end."""

    freeze_steps: Count = 0
    """Steps at the beginning in which only the head is trained."""

    layer_decay: PositiveShare = 1.0
    """The learning rate of block n of L, n from 1, is multiplied by layer_decay ** (L + 1 - n)
    (Clark et al. 2020); 1: all the same."""

    layer_decay_front_end: bool = False
    """Multiply the learning rate of the front end by layer_decay ** (L + 1), as BEiT does; false:
    leave it, as fairseq does."""

    head_lr: Factor = 1.0
    """Factor of the learning rate of the head."""

    head_std: Amount | None = None
    """Standard deviation of the initial weights of the head's last layer; null: Xavier-uniform
    weights for ctc, 0.02 otherwise."""

    head_dropout: BelowOne = 0.0
    """Dropout of the encoder's output, before the head."""

    pool: Literal["auto", "mean", "first"] = "auto"
    """Which tokens the head of a classification or regression reads: their mean, or the first one.
    auto: first for text, as RoBERTa does; mean otherwise."""

    bos_id: Count | None = 0
    """Text: the id that is prepended to each text that does not begin with it; null: none."""

    label_smoothing: Share = 0.0
    """classification: the probability that is spread over all classes."""

    mixup: Amount = 0.0
    """Images: alpha of mixup (Zhang et al. 2018); 0: none."""

    cutmix: Amount = 0.0
    """Images: alpha of CutMix (Yun et al. 2019); 0: none."""

    mix_prob: Share = 1.0
    """The probability that the images of a micro-batch are mixed."""

    mix_switch: Share = 0.5
    """The probability of CutMix if both mixup and cutmix are set."""

    erase: Share = 0.0
    """Images: the probability that a rectangle is replaced by noise (random erasing, Zhong et al.
    2020)."""

    augment: Literal["none", "rand"] = "none"
    """Images: rand: two random operations of RandAugment (Cubuk et al. 2020) at magnitude 9 with
    standard deviation 0.5."""

    time_mask: BelowOne = 0.0
    """Speech: the fraction of tokens that spans of time_mask_length are drawn for, in training."""

    time_mask_length: Positive = 10
    """Length of a masked span of tokens."""

    time_mask_with: Literal["token", "zero", "noise"] = "token"
    """What replaces masked tokens. token: the mask token of data2vec 1.0; noise: N(0, 0.01), as
    fairseq for 2.0; zero."""

    channel_mask: BelowOne = 0.0
    """Speech: the fraction of channels that spans of channel_mask_length are drawn for; they are
    set to zero."""

    channel_mask_length: Positive = 64
    """Length of a masked span of channels."""

    def __post_init__(self) -> None:
        if self.freeze_blocks and self.freeze not in ("front_end", "encoder"):
            raise ValueError(
                f"freeze_blocks={self.freeze_blocks} needs freeze=front_end, got {self.freeze}"
            )
