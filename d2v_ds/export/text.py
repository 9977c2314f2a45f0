"""The tokenizer of an export, from the one that made the ids of the training text.

    tokenizer.model --converted--> tokenizer.json      loads without sentencepiece or remote code
                    --otherwise--> tokenization_d2v.py with tokenizer.model
    tokenizer.json  -------------> tokenizer.json      with eos after each text

Both give the ids of `d2v-shards text --label-key`: each text ends with eos, the character of
sentencepiece for a space becomes bytes, and names of special tokens in a text are ordinary
characters. Models that normalise the text, for example, are not converted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from d2v_ds.data.tokenizer_json import is_json
from d2v_ds.errors import UserError
from d2v_ds.export.text_json import JsonTokenizer
from d2v_ds.export.tokenizer import TextTokenizer

SPACE = "▁"  # the character that sentencepiece uses for a space
NORMAL, UNIGRAM, BPE = 1, 1, 2  # types of pieces and of models
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class SentencePiece(TextTokenizer):
    """A sentencepiece model. Raises RuntimeError if the bytes are not a model."""

    def __init__(self, model: bytes, max_tokens: int, prefix: int | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        super().__init__(model, max_tokens, prefix)
        self.pieces = SentencePieceProcessor()
        self.pieces.LoadFromSerializedProto(model)

    @property
    def vocab_size(self) -> int:
        return self.special_ids["mask"] + 1

    @property
    def special_ids(self) -> dict[str, int]:
        """{bos, eos, pad, unk, mask: id}, as in the index of a shard set."""
        ids = {name: getattr(self.pieces, f"{name}_id")() for name in ("bos", "eos", "pad", "unk")}
        if ids["pad"] < 0:  # models without pad: packed text has no bos, so bos serves as padding
            ids["pad"] = ids["bos"]
        ids["mask"] = self.pieces.GetPieceSize()
        return {name: i for name, i in ids.items() if i >= 0}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with eos and the prefix."""
        space = [self.pieces.PieceToId(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        ids = [] if self.prefix is None else [self.prefix]
        for i, part in enumerate(text.split(SPACE)):
            ids += space if i else []
            ids += self.pieces.EncodeAsIds(part)
        return [*ids, self.pieces.eos_id()]

    def special_tokens(self) -> dict[str, str]:
        """{bos_token ...: its name}."""
        names = {}
        for name, i in self.special_ids.items():
            if name == "mask":
                names["mask_token"] = "<mask>" if self._is_new("<mask>") else "<d2v_mask>"
            else:
                names[f"{name}_token"] = self.pieces.IdToPiece(i)
        return names

    def _is_new(self, name: str) -> bool:
        return self.pieces.PieceToId(name) == self.pieces.unk_id()


def open_tokenizer(
    path: Path, settings: dict[str, Any], prefix: int | None = None
) -> TextTokenizer:
    """The tokenizer in a file; settings: modality.text.*; prefix: as in TextTokenizer. Raises
    UserError if it is not a tokenizer or has other ids than the model of the export."""
    content = path.read_bytes()
    try:
        kind: type[TextTokenizer] = JsonTokenizer if is_json(content) else SentencePiece
        text = kind(content, settings["max_tokens"], prefix)
    except (RuntimeError, ValueError):
        raise UserError(f"{path}: is not a sentencepiece model, nor a tokenizer.json") from None
    special = text.special_ids
    found = {
        "vocab_size": text.vocab_size,
        "pad_id": special.get("pad"),
        "mask_id": special["mask"],
    }
    if "eos" not in special:
        raise UserError(f"{path}: has no eos, which ends each text")
    for name, value in found.items():
        if settings[name] != value:
            raise UserError(
                f"{path}: has {name}={value}, but the model was trained with "
                f"modality.text.{name}={settings[name]}; give its own tokenizer with --tokenizer"
            )
    return text


def converted(text: SentencePiece) -> str | None:
    """tokenizer.json, or None if the conversion would not be exact.

    Spaces are spaces in its pieces, so that the character SPACE is unknown and falls back to bytes.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

    protobuf: Any = sentencepiece_model_pb2
    proto = protobuf.ModelProto.FromString(text.model)
    kind = proto.trainer_spec.model_type
    ordinary = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type == NORMAL]
    special = [p.piece for p in proto.pieces if p.type != NORMAL]
    if not convertible(proto, kind, ordinary, special):
        return None
    pieces = [(p.piece.replace(SPACE, " "), p.score) for p in proto.pieces]
    unk = text.special_ids["unk"]
    if kind == UNIGRAM:
        model: Any = models.Unigram(pieces, unk_id=unk, byte_fallback=True)
    else:
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        merges = bpe_merges(dict(pieces), set(ordinary))
        model = models.BPE(ids, merges, unk_token=pieces[unk][0], fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    if kind == UNIGRAM:  # its pieces for bytes and special tokens must not match the text
        names = "|".join(re.escape(name[1:]) for name in special)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(
            tokenizers.Regex(f"<(?={names})"), "isolated"
        )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokens = text.special_tokens()
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name in dict.fromkeys(tokens.values())
        ]
    )
    eos, around = tokens["eos_token"], [(tokens["eos_token"], text.special_ids["eos"])]
    first = ""
    if text.prefix is not None:
        around.append((text.pieces.IdToPiece(text.prefix), text.prefix))
        first = around[-1][0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {eos}".strip(),
        pair=f"{first} $A {eos} $B:1 {eos}:1".strip(),
        special_tokens=around,
    )
    return str(tokenizer.to_str(pretty=True))


def convertible(proto: Any, kind: int, ordinary: list[str], special: list[str]) -> bool:
    """Whether tokenizers can express the model: as those that `d2v-shards tokenizer` trains."""
    spec = proto.normalizer_spec
    plain = not (
        spec.precompiled_charsmap
        or spec.add_dummy_prefix
        or spec.remove_extra_whitespaces
        or not spec.escape_whitespaces
        or proto.trainer_spec.treat_whitespace_as_suffix
    )
    bytes_and_controls = {2, 3, 6}  # unk, control, byte
    types = {p.type for p in proto.pieces} <= {NORMAL, *bytes_and_controls}
    isolated = all(name.startswith("<") for name in special) and not any(
        "<" in piece and len(piece) > 1 for piece in ordinary
    )
    return (
        plain
        and types
        and proto.trainer_spec.byte_fallback
        and set(BYTES) <= set(special)
        and (kind == BPE or (kind == UNIGRAM and isolated))
    )


def bpe_merges(scores: dict[str, float], ordinary: set[str]) -> list[tuple[str, str]]:
    """The merges of a BPE model, in their order: sentencepiece joins two neighbours if the result
    is a piece, the one with the highest score first."""
    merges = []
    for piece in sorted(ordinary, key=lambda piece: -scores[piece]):
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(a, b) for a, b in splits if a in ordinary and b in ordinary]
    return merges
