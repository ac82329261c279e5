"""Owns the `tokenizer.json` of a vocabulary: its pieces and rules in the form of tokenizers.

It is near to the model's own tokenizer, not equal: `LIMITS` says what differs.

Does not know: where the file goes.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

if TYPE_CHECKING:  # a type checker does not know chatglm.model: see there
    from vocabulary_chatglm import (
        NORMALIZER_TAG,
        SPECIAL_TEXTS,
        WHITESPACE,
        complete_vocabulary,
    )
else:
    from chatglm.model.vocabulary_chatglm import (
        NORMALIZER_TAG,
        SPECIAL_TEXTS,
        WHITESPACE,
        complete_vocabulary,
    )

NEVER = -1e4  # the score of an entry that goes behind all pieces of text
CHARSMAP_FIELD = 2  # of SentencePiece's NormalizerSpec
SPACE = "\u2581"  # SentencePiece's sign of a space
WIRE_SIZES = {1: 8, 5: 4}  # bytes of the numbers of fixed length
LIMITS = """\
# tokenizer.json: what it is not

Written by `chatglm export-tokenizer` for programs that read nothing else. The tokenizer of this
model is `ice_text.model` with its Python class; the file beside this page is near to it, and
differs:

- Where two ways to cut a text have nearly the same score, SentencePiece rounds to 32 bits and the
  library tokenizers does not. Runs of one sign (`====`, `。。。`) and repeated text get other ids.
- Characters that are replaced by others, above all those put together from several, are not
  always replaced in the same way.
- What a person typed is not kept apart: `<n>`, `<|tab|>` and `[MASK]` in a text become white space
  and tokens. So do names of other special tokens and of bytes (`</s>`, `<0x41>`) where the
  vocabulary has no piece for their signs. Do not build a chat of foreign texts with this file.
- A rendered chat, which ends with `[gMASK]<sop>`, is encoded as any other text: this `[gMASK]` is
  letters, and a second border is put behind it. There is no chat template in the file.
- A text that has a mask in it is closed as if it had none (first generation, 150528 ids).
- Beside tokens that were added, white space may differ.
- Offsets are those of the library: those of runs of spaces, and behind characters that are
  dropped, are wrong.
- Decoding leaves spaces in front of signs (" ,") where they are, and bytes that are no whole
  character may come out otherwise.

`chatglm export-tokenizer DIR --check FILE` counts the lines of a text of yours that get other ids.
"""


def build_tokenizer(tokenizer: Any) -> Tokenizer:
    """Return the tokenizer of the library tokenizers that is nearest to a model's own.

    Args:
        tokenizer: a `ChatGLMTokenizer`, of either generation.
    """
    unknown = tokenizer.num_image_tokens
    pieces = list_pieces(tokenizer)
    built = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=True))
    built.normalizer = normalizers.Sequence([*_open_texts(tokenizer), *_join_spaces()])
    built.decoder = _build_decoder(unknown)
    built.post_processor = _build_closing(tokenizer)
    _add_tokens(built, tokenizer)
    return built


def list_pieces(tokenizer: Any) -> list[tuple[str, float]]:
    """Return the name and the score of every id, image ids included.

    SentencePiece has types of pieces and tokenizers has none, so what a type means becomes a score:
    white space goes before all ways to cut its name, special tokens and bytes come last.
    """
    processor = tokenizer._processor
    numbers = range(processor.get_piece_size())
    names, scores = processor.id_to_piece([*numbers]), processor.get_score([*numbers])
    plain = [not (processor.is_control(k) or processor.is_byte(k)) for k in numbers]
    plain[processor.unk_id()] = False
    best = max(score for name, score, is_plain in zip(names, scores, plain) if is_plain)
    found = [(f"<image_{index}>", NEVER) for index in range(tokenizer.num_image_tokens)]
    for name, score, is_plain in zip(names, scores, plain):
        if name in WHITESPACE:
            score = len(name) * max(best, 0.0) + 1.0
        found.append((name, score if is_plain else NEVER))
    return found


def _open_texts(tokenizer: Any) -> Iterator[Any]:
    """What the class does to a text before SentencePiece gets it, and SentencePiece's own table."""
    if tokenizer.remove_space:
        yield normalizers.Replace(Regex(r"\s+"), " ")
    if tokenizer.do_lower_case:
        yield normalizers.Lowercase()
    for piece, text in sorted(WHITESPACE.items(), key=lambda item: -len(item[1])):
        yield normalizers.Replace(text, piece)
    yield normalizers.Precompiled(read_charsmap(tokenizer._vocab_content))


def _join_spaces() -> list[Any]:
    """No space at either end, one at most between words, and the sign of one in front."""
    return [
        normalizers.Replace(Regex(r"\A +"), ""),
        normalizers.Replace(Regex(r" +\z"), ""),
        normalizers.Replace(Regex(" +"), SPACE),
        normalizers.Prepend(SPACE),
    ]


def _build_decoder(num_image_tokens: int) -> Any:
    """Special tokens and images are nothing, white space is what it names."""
    hidden = [decoders.Replace(text, "") for text in SPECIAL_TEXTS if text != "<unk>"]
    if num_image_tokens:
        hidden.append(decoders.Replace(Regex(r"\A<image_\d+>\z"), ""))
    shown = [decoders.Replace(piece, text) for piece, text in WHITESPACE.items()]
    start = [decoders.ByteFallback(), decoders.Replace(SPACE, " "), decoders.Fuse()]
    return decoders.Sequence([*hidden, *start, decoders.Strip(" ", 1, 0), *shown])


def _build_closing(tokenizer: Any) -> Any:
    """How an input is closed: by the class's own rule for texts without a mask."""
    first, second = tokenizer.convert_tokens_to_ids(["<n>", "<|tab|>"])  # stand for the two texts
    names = {first: "$A", second: "$B"}
    single = tokenizer.build_inputs_with_special_tokens([first])
    pair = tokenizer.build_inputs_with_special_tokens([first], [second])
    special = {index: tokenizer.convert_ids_to_tokens(index) for index in {*pair} - {*names}}
    names |= special
    return processors.TemplateProcessing(
        single=" ".join(f"{names[index]}:0" for index in single),
        pair=" ".join(f"{names[index]}:0" for index in pair),
        special_tokens=[(name, index) for index, name in special.items()],
    )


def _add_tokens(built: Tokenizer, tokenizer: Any) -> None:
    """Give it the texts that are tokens of their own, and what they do to spaces beside them."""
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        is_own = index < tokenizer.vocab_size  # of the vocabulary: white space beside it is lost
        added = AddedToken(
            token.content,
            lstrip=is_own or token.lstrip,
            rstrip=is_own or token.rstrip,
            normalized=False,
            special=token.special,
        )
        add = built.add_special_tokens if token.special else built.add_tokens
        add([added])
        if built.token_to_id(token.content) != index:
            raise ValueError(
                f"token {token.content!r} has id {index}, where a tokenizer.json would give "
                f"{built.token_to_id(token.content)}: add tokens without gaps between their ids"
            )


def read_charsmap(model_proto: bytes) -> bytes:
    """Return the table by which a vocabulary's characters are replaced, in its encoded form."""
    for tag, body in read_fields(complete_vocabulary(model_proto)):
        if tag == NORMALIZER_TAG >> 3:
            return dict(read_fields(body)).get(CHARSMAP_FIELD, b"")
    raise AssertionError("a complete vocabulary says how characters are replaced")


def read_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields of an encoded message; a number's is its bytes."""
    place = 0
    while place < len(message):
        key, place = _read_number(message, place)
        number, kind = key >> 3, key & 7
        start = place
        if kind == 0:
            _, place = _read_number(message, place)
        elif kind == 2:
            length, start = _read_number(message, place)
            place = start + length
        else:
            place += WIRE_SIZES[kind]
        yield number, message[start:place]


def _read_number(message: bytes, place: int) -> tuple[int, int]:
    """The number that begins at a place, seven bits a byte, and the place behind it."""
    value, shift = 0, 0
    while True:
        byte = message[place]
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if byte < 0x80:
            return value, place
