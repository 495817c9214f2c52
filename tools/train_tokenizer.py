"""Trains a small tokenizer with SentencePiece and saves it as a fast tokenizer that AutoTokenizer loads unchanged.

In: lines of text. Out: a folder with tokenizer.json, tokenizer_config.json and chat_template.jinja. The ids are those
of the SentencePiece model, with Qwen's special tokens and the think/answer tags as single tokens.

    python tools/train_tokenizer.py --text FILE --vocab 352 --out DIR
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' or 'image' in part %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' or 'video' in part %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
NORMAL_PIECE = 1  # ModelProto.SentencePiece.Type.NORMAL: learned, as against bytes, unknown and the tokens above
SPACE = "\u2581"  # what SentencePiece writes for a space


def train_sentencepiece(lines: Iterable[str], vocab_size: int) -> bytes:
    """The serialised SentencePiece BPE model; fewer pieces than `vocab_size` when the text has no more to merge.

    Bytes stand in for unseen characters, digits are never merged, and the text is taken as it is
    (no normalisation, no space added or removed), so decoding gives back exactly what was encoded.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[*SPECIAL_TOKENS, *TAGS],
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _merges(pieces: list[Any]) -> list[tuple[str, str]]:
    """Every way to join two learned pieces into a learned piece, best score first.

    SentencePiece keeps pieces and scores, not the pairs it merged; it joins whichever neighbours form the piece of
    the best score, which is what this list says to a BPE that works with pairs.
    """
    learned = [piece for piece in pieces if piece.type == NORMAL_PIECE]
    known = {piece.piece for piece in learned}
    merges: list[tuple[str, str]] = []
    for piece in (p.piece for p in sorted(learned, key=lambda p: -p.score)):
        splits = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        merges.extend((left, right) for left, right in splits if left in known and right in known)
    return merges


def to_backend(model: bytes) -> Tokenizer:
    """The same vocabulary, ids and merges as a `tokenizers.Tokenizer`."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    proto.ParseFromString(model)
    pieces = list(proto.pieces)
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return backend


def to_fast_tokenizer(model: bytes, max_length: int = 4096) -> PreTrainedTokenizerFast:
    """A Hugging Face fast tokenizer with Qwen's token names and chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=to_backend(model),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def train_tokenizer(lines: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train and convert."""
    return to_fast_tokenizer(train_sentencepiece(lines, vocab_size))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a small tokenizer with SentencePiece.")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, one sentence a line")
    parser.add_argument("--vocab", type=int, default=352, help="pieces, special tokens and 256 bytes included")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    tokenizer = train_tokenizer(args.text.read_text(encoding="utf-8").splitlines(), args.vocab)
    tokenizer.save_pretrained(args.out)
    print(f"{len(tokenizer)} tokens written to {args.out}")


if __name__ == "__main__":
    main()
