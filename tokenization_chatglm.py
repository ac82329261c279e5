"""Text to ids and back, for every generation of ChatGLM-6B.

Owns: which texts are tokens of their own, how white space becomes pieces, how an input is closed,
and how a rendered chat becomes ids. Piece `k` of the file has id `k + num_image_tokens`; no id is
written down here.

Does not know: the model, the prompt format (chat_template.jinja), the rules of masks and positions
(masking_chatglm), what a vocabulary file is made of (vocabulary_chatglm).

Shapes: `B` batch, `S` tokens.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import logging

from .batches_chatglm import BatchMixin
from .environment_chatglm import find_settled, is_streaming
from .fragments_chatglm import (
    ESCAPE,
    ESCAPED,
    FALSE_MARK,
    PARTING,
    SPACE,
    TAG,
    TYPED,
    Part,
    Sides,
    add_tokens,
    join_parts,
    marks_pattern,
    move_part,
    name_white_space,
    part_typed,
    replace_surrogates,
)
from .masking_chatglm import SpecialIds, build_geometry
from .messages_chatglm import check_messages, read_messages
from .offsets_chatglm import place_id, place_part
from .vocabulary_chatglm import SPECIAL_TEXTS, WHITESPACE, complete_vocabulary

VOCAB_FILES_NAMES = {"vocab_file": "ice_text.model"}

# What chat_template.jinja writes between a prompt and its answer, and behind the answer.
BORDER, END = ("[gMASK]", "<sop>"), "<eop>"
UNFINISHED_CHAT = (
    "A text has [gMASK]<sop> in it and ends otherwise: it is bare text, no rendered chat. For the "
    "beginning of an answer behind it, call apply_chat_template(tokenize=True)."
)
logger = logging.get_logger(__name__)
# What pieces that are no text decode to, and None where it depends on the pieces beside them.
TEXTS: dict[str, str | None] = {
    **dict.fromkeys(SPECIAL_TEXTS, ""),
    **dict.fromkeys(("<unk>", *(f"<0x{byte:02X}>" for byte in range(256)))),
    **WHITESPACE,
}
OFFSETS = "offset_mapping"  # of SentencePiece
MUCH = 20000  # characters of a batch from which on more threads than one pay


class ChatGLMTokenizer(BatchMixin, PreTrainedTokenizer):
    """Tokenizer of ChatGLM-6B: SentencePiece pieces, and `[gMASK] <sop>` behind every prompt.

    A bare `tokenizer(text)` takes the texts of `bos_token`, `eos_token`, `unk_token`, `pad_token`
    and `mask_token` for these tokens and drops the white space around them, as the original did.
    With `split_special_tokens=True` they are ordinary text: use it for what a user typed.

    Args:
        vocab_file: an `ice_text.model` of either generation.
        do_lower_case: lower the text.
        remove_space: make one space of every run of white space, line breaks included.
        bos_token: the border between prompt and answer.
        eos_token: `<eop>`, or `</s>` in the first generation, whose rule to close an input goes
            with it (see `build_inputs_with_special_tokens`). None takes the one that goes with
            `num_image_tokens`.
        end_token, eop_token, gmask_token: tokens that have an id but are never split off a text.
        padding_side: "left" or "right".
        num_image_tokens: ids in front of the first piece: 20000 with 150528 rows, 0 with 130528.
        **kwargs: as in the base class. `clean_up_tokenization_spaces` is False by default in the
            first generation and True in the later one, as it was.

    Raises:
        ValueError: if the vocabulary file or one of these values cannot be used.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]
    bos_token_id: int
    mask_token_id: int
    pad_token_id: int

    def __init__(
        self,
        vocab_file: str,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: str = "<sop>",
        eos_token: str | None = None,
        end_token: str = "</s>",
        eop_token: str = "<eop>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        padding_side: str = "left",
        num_image_tokens: int = 20000,
        **kwargs: Any,
    ) -> None:
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self._read_vocabulary(vocab_file, num_image_tokens)
        own = {"end_token": end_token, "eop_token": eop_token, "gmask_token": gmask_token}
        self._name_own_tokens(own, kwargs)
        if eos_token is None:
            eos_token = self.end_token if num_image_tokens else self.eop_token
        self._is_first_generation = str(eos_token) != self.eop_token
        # Decoding made "," of " ," in the later checkpoints' class, and never in the fork's.
        kwargs.setdefault("clean_up_tokenization_spaces", not self._is_first_generation)
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            padding_side=padding_side,
            num_image_tokens=num_image_tokens,
            **kwargs,
        )
        self.init_kwargs.update(own)  # save_pretrained writes these

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "ChatGLMTokenizer":
        """As in the base class, but an error in the vocabulary file is shown as what it is.

        Without protobuf, which nothing here needs, transformers 4 makes it a call for protobuf.
        """
        try:
            return super().from_pretrained(*args, **kwargs)
        except ImportError as error:
            if isinstance(error.__context__, ValueError):
                raise error.__context__ from None
            raise
        except TypeError as error:  # of a token that is no text, which names no file
            raise ValueError(f"tokenizer_config.json of {str(*args[:1])}: {error}") from error

    def _read_vocabulary(self, vocab_file: str | None, num_image_tokens: int) -> None:
        """Load the pieces and give each its id."""
        if type(num_image_tokens) is not int or num_image_tokens < 0:
            raise ValueError(f"num_image_tokens must be 0 or more, got {num_image_tokens!r}")
        if vocab_file is None or not Path(vocab_file).is_file():
            name = vocab_file or VOCAB_FILES_NAMES["vocab_file"]
            raise ValueError(f"no vocabulary file {name}; take the one of the checkpoint")
        self.vocab_file = vocab_file
        self.num_image_tokens = num_image_tokens
        self._vocab_content = Path(vocab_file).read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(
                model_proto=complete_vocabulary(self._vocab_content)
            )
            self._pieces = self._processor.id_to_piece([*range(self._processor.get_piece_size())])
        except (ValueError, RuntimeError) as error:  # the latter is SentencePiece's own
            raise ValueError(f"{vocab_file} {error}") from error
        names = [f"<image_{index}>" for index in range(num_image_tokens)] + self._pieces
        self._vocab = {name: index for index, name in enumerate(names)}
        self._special_ids = frozenset(self._vocab[text] for text in SPECIAL_TEXTS)
        self._shown: list[str | None] = [*[None] * num_image_tokens, *self._pieces]
        for piece, text in TEXTS.items():
            self._shown[self._vocab[piece]] = text

    def _name_own_tokens(self, own: dict[str, str], kwargs: dict[str, Any]) -> None:
        """Set the tokens that transformers has no name for, as plain attributes.

        As special tokens of the base class they would be split off every text. transformers 5 hands
        them over in one dictionary, and saves a list under a name that means another thing in 4.
        """
        others = kwargs.pop("model_specific_special_tokens", {})
        own.update({name: str(others.pop(name, token)) for name, token in own.items()})
        if others:
            kwargs["model_specific_special_tokens"] = others
        if isinstance(kwargs.get("extra_special_tokens"), list):
            kwargs["additional_special_tokens"] = kwargs.pop("extra_special_tokens")
        for name, token in own.items():
            if token not in self._vocab:
                raise ValueError(
                    f"{name} {token!r} is no piece of {self.vocab_file}; name one that is"
                )
        self.end_token, self.eop_token = own["end_token"], own["eop_token"]
        self.gmask_token = own["gmask_token"]

    @property
    def vocab_size(self) -> int:
        """Number of ids of the vocabulary, with image ids and without added tokens."""
        return len(self._vocab)

    @property
    def gmask_token_id(self) -> int:
        """Id of `[gMASK]`, which stands behind a prompt."""
        return self._vocab[self.gmask_token]

    @property
    def eop_token_id(self) -> int:
        """Id of `<eop>`, which ends an answer."""
        return self._vocab[self.eop_token]

    @property
    def end_token_id(self) -> int:
        """Id of `</s>`."""
        return self._vocab[self.end_token]

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id, image and added tokens included."""
        return {**self._vocab, **self.get_added_vocab()}

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Id of a token or ids of several; transformers 5.8 sorts added tokens for every one."""
        added = self.get_added_vocab()
        if tokens is None or isinstance(tokens, str):
            return None if tokens is None else added.get(tokens, self._convert_token_to_id(tokens))
        return [added.get(token, self._convert_token_to_id(token)) for token in tokens]

    def _convert_token_to_id(self, token: str) -> int:
        """Id of a token; an unknown one has that of `<unk>`."""
        return self._vocab.get(token, self.num_image_tokens)

    def _convert_id_to_token(self, index: int) -> str:
        """Token of an id; an id out of range has the empty token."""
        if 0 <= index < self.num_image_tokens:
            return f"<image_{index}>"
        piece = index - self.num_image_tokens
        return self._pieces[piece] if 0 <= piece < len(self._pieces) else ""

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Split a text into tokens; `split_special_tokens` makes it all ordinary text."""
        plain = kwargs.get("split_special_tokens", self.split_special_tokens)
        (parts,) = self._cut_texts([text], kwargs.get("markup") or ("none" if plain else "named"))
        pieces = self._run([part.text for part in parts], str)
        return join_parts(parts, iter(pieces), "<n>", list)

    def _encode_texts(self, texts: list[str], markup: str) -> list[list[int]]:
        """Ids of every text, with one call of SentencePiece for all of them."""
        cuts = self._cut_texts(texts, markup)
        encoded = self._run([part.text for parts in cuts for part in parts], int)
        if self.num_image_tokens:
            encoded = [[piece + self.num_image_tokens for piece in row] for row in encoded]
        rows, newline = iter(encoded), self._vocab["<n>"]
        return [join_parts(parts, rows, newline, self.convert_tokens_to_ids) for parts in cuts]

    def _encode_placed(self, texts: list[str], markup: str) -> list[list[int]]:
        """As `_encode_texts`, with ids that know their spans."""
        if markup == "all":
            raise ValueError("a rendered chat has offsets as a text: tokenize=False, and encode it")
        cuts = self._cut_texts(texts, markup)
        encoded = iter(self._run([part.text for parts in cuts for part in parts], OFFSETS))
        return [
            [index for part in parts for index in self._place(part, next(encoded))]
            for parts in cuts
        ]

    def _place(self, part: Part, found: Any) -> list[int]:
        """Ids of a part and of the tokens behind it."""
        kept, spans = place_part(part, found, "<n>", self.remove_space, self.do_lower_case)
        ids = [found["ids"][place] + self.num_image_tokens for place in kept]
        ids += self.convert_tokens_to_ids(part.tokens)
        return [*map(place_id, ids, spans)]

    def _run(self, fragments: list[str], out_type: Any) -> list[Any]:
        """What SentencePiece makes of every fragment; by torch's number of threads if it is much.

        A list is encoded in a thread that is begun for it, a text alone is not.
        """
        if len(fragments) == 1:
            return [self._processor.encode(fragments[0], out_type=out_type)]
        is_much = sum(map(len, fragments)) > MUCH
        num_threads = torch.get_num_threads() if is_much else 1
        return self._processor.encode(fragments, out_type=out_type, num_threads=num_threads)

    def _cut_texts(self, texts: list[str], markup: str) -> list[list[Part]]:
        """The parts of every text, which are cut at its marks."""
        names = {markup, "none"} if markup == "named" else {markup}
        patterns = {name: marks_pattern(self._marks(name)) for name in names}
        return [self._cut_text(text, markup, patterns) for text in texts]

    def _cut_text(self, text: str, markup: str, patterns: dict[str, re.Pattern[str]]) -> list[Part]:
        """The parts of a text, one at least; a rendered chat has its border behind the first."""
        if markup == "named" and "".join(BORDER) in text:
            if text.endswith(("".join(BORDER), END)):
                return self._cut_chat(text, patterns)
            logger.warning_once(UNFINISHED_CHAT)
        text = text if text.isascii() else replace_surrogates(text)
        text = text if markup == "named" else TAG.sub(part_typed, text)
        cut = patterns[markup].split(text)  # text, mark, text, ..., mark, text
        if markup == "all":
            cut[::2] = [ESCAPED.sub(r"\1", piece) for piece in cut[::2]]
        if len(cut) == 1:
            return [Part(self._prepare_text(cut[0]), raw=cut[0])]
        sides = {mark: self._sides(mark, markup) for mark in set(cut[1::2])}
        edges = [Sides(), *(sides[mark] for mark in cut[1::2]), Sides()]
        parts, start = [], 0
        for raw, mark, left, right in zip(cut[::2], [*cut[1::2], ""], edges, edges[1:]):
            end = start + len(raw)
            part = self._prepare_part(raw, left, right)
            kept = raw.lstrip() if left.strips_right else raw
            tokens = TYPED.get(mark, (mark,) if mark else ())
            after = end + (len(mark) if mark != PARTING else 0)
            parts.append(
                part._replace(
                    tokens=tokens, start=end - len(kept), spans=((end, after),) * len(tokens)
                )
            )
            start = after
        return parts

    def _cut_chat(self, text: str, patterns: dict[str, re.Pattern[str]]) -> list[Part]:
        """Parts of a rendered chat: its last border and an end behind that, else text."""
        prompt, _, answer = text.rpartition("".join(BORDER))
        answer, end = (answer[: -len(END)], (END,)) if answer.endswith(END) else (answer, ())
        begin = len(prompt) + len("".join(BORDER))
        found = [match.start() for match in FALSE_MARK.finditer(answer) if match[0]]
        answer = FALSE_MARK.sub(lambda match: match[0][1:], answer)
        first, last = (self._cut_text(side, "none", patterns) for side in (prompt, answer))
        first[-1] = add_tokens(first[-1], BORDER, len(prompt))
        last[-1] = add_tokens(last[-1], end, len(answer))
        gone = tuple(begin + place for place in found)
        return first + [move_part(part, begin)._replace(gone=gone) for part in last]

    def _marks(self, markup: str) -> tuple[str, ...]:
        """Texts that are tokens of their own.

        With "named" the special tokens of the base class and all added tokens, with "none" added
        tokens that are not special, with "all" every special and added token.
        """
        added = self.added_tokens_decoder.values()
        marks = [token.content for token in added if markup != "none" or not token.special]
        marks += [] if markup == "named" else TYPED
        return (*marks, *SPECIAL_TEXTS) if markup == "all" else tuple(marks)

    def _sides(self, mark: str, markup: str) -> Sides:
        """What a mark does to the text beside it."""
        if mark in TYPED:
            return Sides(is_added=True)
        index = self.get_added_vocab().get(mark, 0)
        if index >= self.vocab_size:
            token = self.added_tokens_decoder[index]
            return Sides(token.lstrip, token.rstrip, is_added=True)
        # The original lost white space beside its special tokens; a template means what it says.
        return Sides(markup == "named", markup == "named")

    def _prepare_part(self, text: str, left: Sides, right: Sides) -> Part:
        """Text between two marks, without the white space that these take away.

        SentencePiece adds a space in front of a text and drops those behind it. A line break beside
        an added token, which `join_parts` drops again, keeps it from that: "a<new>b" comes back so.
        """
        raw = text.lstrip() if left.strips_right else text
        raw = raw.rstrip() if right.strips_left else raw
        text = "<n>" * left.is_added + self._prepare_text(raw) + "<n>" * right.is_added
        return Part(text, left.is_added, right.is_added, raw=raw)

    def _prepare_text(self, text: str) -> str:
        """A text with its white space in pieces, and in the case that is asked for."""
        text = " ".join(text.split()) if self.remove_space else text
        return name_white_space(text.lower() if self.do_lower_case else text)

    def prepare_for_model(
        self, ids: list[int], pair_ids: Any = None, add_special_tokens: bool = True, **kwargs: Any
    ) -> BatchEncoding:
        """As in the base class, but a rendered chat has its border already."""
        ids, add_special_tokens = self._open(ids, pair_ids is not None, add_special_tokens)
        return super().prepare_for_model(ids, pair_ids, add_special_tokens, **kwargs)

    def _open(self, ids: list[int], has_pair: bool, is_to_close: bool) -> tuple[list[int], bool]:
        """The ids of a text, and whether they are still to be closed: a chat has its border."""
        border = (self._vocab[BORDER[0]], self._vocab[BORDER[1]])
        if border[0] not in ids:
            return ids, is_to_close
        if is_to_close and has_pair and tuple(ids[-2:]) == border:
            return ids[:-2], True
        return ids, is_to_close and border not in [*pairwise(ids)]

    def _batch_encode_plus(
        self, *args: Any, split_special_tokens: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        """Pass `split_special_tokens` on, as transformers 4 does for a text but not for a batch."""
        if split_special_tokens:
            kwargs.setdefault("markup", "none")
        return super()._batch_encode_plus(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to a text, in which control tokens are nothing."""
        return self._processor.decode([WHITESPACE.get(token, token) for token in tokens])

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; a streamer of transformers gets what no later token will change."""
        if not is_streaming():
            return super().decode(token_ids, *args, **kwargs)
        cleans_up = kwargs.pop("clean_up_tokenization_spaces", None)
        text: Any = super().decode(token_ids, clean_up_tokenization_spaces=False, **kwargs)
        cleans_up = self.clean_up_tokenization_spaces if cleans_up is None else cleans_up
        return find_settled(text, bool(cleans_up))

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """As in the base class; rows of ids are decoded together."""
        rows = sequences.tolist() if hasattr(sequences, "tolist") else sequences
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
        if not all(isinstance(row, (list, tuple)) for row in rows):
            return super().batch_decode(
                rows, skip_special_tokens, clean_up_tokenization_spaces, **kwargs
            )
        return self._decode_rows(rows, skip_special_tokens, clean_up_tokenization_spaces)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """Text of ids. Image ids and ids out of range are no text, and no error."""
        ids = [token_ids] if isinstance(token_ids, int) else [*map(int, token_ids)]
        return self._decode_rows([ids], skip_special_tokens, clean_up_tokenization_spaces)[0]

    def _decode_rows(
        self, rows: list[list[int]], skip_special_tokens: bool, cleans_up: bool | None
    ) -> list[str]:
        """Texts of rows: of plain pieces at once, and by SentencePiece where bytes are among them.

        It is asked for the rows with a token that was added, too, and for those with an id that has
        no text.
        """
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        if self._is_first_generation:
            skipped.discard(self.num_image_tokens)  # its decode showed `<unk>` in any case
        # Tokens that are hidden, or of another name, though a piece of text has their id.
        named = {*skipped, *self.added_tokens_decoder}
        odd = {index for index in named if any(self._shown[index : index + 1])}
        texts = [self._join_pieces(row, odd) for row in rows]
        for place in [place for place, text in enumerate(texts) if text is None]:
            ids = [index for index in map(int, rows[place]) if index >= self.num_image_tokens]
            shown = [index for index in ids if index not in skipped]
            texts[place] = self.convert_tokens_to_string(self.convert_ids_to_tokens(shown))
        if self.clean_up_tokenization_spaces if cleans_up is None else cleans_up:
            return [self.clean_up_tokenization(text or "") for text in texts]
        return [text or "" for text in texts]

    def _join_pieces(self, row: list[int], odd: set[int]) -> str | None:
        """The text of plain pieces, less the space that SentencePiece puts in front of a text.

        Returns:
            None where a piece has no text of its own, or is one of the `odd` ones.
        """
        if not row or (odd and not odd.isdisjoint(row)) or min(row) < 0:
            return None if row else ""
        try:
            texts: Any = map(self._shown.__getitem__, row)
            text = "".join(texts)
        except (IndexError, TypeError):  # of an id out of range, and of a piece without a text
            return None
        lead = 0
        if text.startswith(SPACE):
            pieces = (piece for index in row if (piece := self._shown[index]))
            for piece in pieces:  # as long as nothing is left of the text
                lead += piece.startswith(SPACE)
                if piece != SPACE:
                    break
        return text[lead:].replace(SPACE, " ")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Close an input: `A [gMASK] <sop>` for a prompt, `A [gMASK] <sop> B <eop>` with an answer.

        The first generation leaves out `[gMASK]` if `A` has a mask already, and puts `</s>` in its
        place if `A` does not end with that mask. The lists stay as they are.
        """
        masks = self._masks()
        if masks.isdisjoint(token_ids_0):
            border = [self.gmask_token_id]
        else:
            border = [] if token_ids_0[-1] in masks else [self.end_token_id]
        answer = [] if token_ids_1 is None else [*token_ids_1, self.eop_token_id]
        return [*token_ids_0, *border, self.bos_token_id, *answer]

    def _masks(self) -> set[int]:
        """Ids that, in a text, stand for the mask that would be put behind it."""
        return {self.mask_token_id, self.gmask_token_id} if self._is_first_generation else set()

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for special tokens of a closed input, else 0; ValueError if an answer comes with it."""
        if already_has_special_tokens and token_ids_1 is not None:
            raise ValueError("a closed input holds its answer already; give token_ids_1=None")
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        special_ids = self._special_ids.union(self.all_special_ids)
        return [int(index in special_ids) for index in token_ids_0]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """A zero for every token of the closed input: the model knows no segments."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def build_legacy_inputs(self, encoding: BatchEncoding) -> BatchEncoding:
        """The inputs that the original gave for a padded batch, of a batch padded or not.

        Returns:
            `input_ids` `(B, S)`, `attention_mask` `(B, 1, S, S)`, boolean, True where hidden, and
            `position_ids` `(B, 2, S)`.
        """
        rows = {name: encoding[name] for name in self.model_input_names if name in encoding}
        batch = self.pad(rows, return_tensors="pt")
        special_ids = SpecialIds(self.bos_token_id, self.mask_token_id, self.gmask_token_id)
        geometry = build_geometry(batch["input_ids"], batch["attention_mask"], special_ids)
        return BatchEncoding({"input_ids": batch["input_ids"], **geometry._asdict()})

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str | TruncationStrategy = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], Any, list[int]]:
        """As in the base class; a rendered chat keeps its `[gMASK] <sop>`, the start of any answer.

        Its prompt gets shorter, and only when nothing of it is left the answer, from its end; it
        has no use for a stride.
        """
        strategy = TruncationStrategy(truncation_strategy)
        if self.gmask_token_id not in ids or pair_ids is not None or strategy == "only_second":
            return super().truncate_sequences(ids, pair_ids, num_tokens_to_remove, strategy, stride)
        border = ids.index(self.gmask_token_id)
        cut = min(num_tokens_to_remove, border)
        first = cut if self.truncation_side == "left" else 0
        last = first + border - cut
        answer = ids[border : max(border + 2, len(ids) - num_tokens_to_remove + cut)]
        return ids[first:last] + answer, None, ids[:first] + ids[last:border]

    def apply_chat_template(
        self,
        conversation: list[Any],
        *args: Any,
        tokenize: bool = True,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Render messages as the model's own prompt, and make ids of it.

        The content of a message is text: a special token that a user types is never taken for one.
        A rendered text that ends with `[gMASK]<sop>` or `<eop>` has the same ids later.

        Args:
            conversation: messages with "role" and "content", dictionaries or objects, or a batch of
                such lists. A list of texts as content is joined.
            tokenize: False to get the text. It is escaped only where an answer has `[gMASK]<sop>`
                in it, or breaks off behind `<eop>`.
            return_assistant_tokens_mask: add `assistant_masks`, 1 for the tokens behind `<sop>`,
                which are the answer and its `<eop>`, and 0 for all others.

        Raises:
            ValueError: for messages that are none, also as jinja's TemplateError, or if masks are
                asked for and no dictionary.
        """
        messages = read_messages(conversation)
        if not messages or not isinstance(messages, list):
            raise ValueError("the conversation is empty or none; give a list of messages")
        for chat in messages if isinstance(messages[0], list) else [messages]:
            check_messages(chat, is_shown=not tokenize)
        kwargs.pop("sanitize_control_tokens", None)  # done in any case, by `_escape`
        if tokenize:
            messages = self._escape(messages)
            kwargs["tokenizer_kwargs"] = {**(kwargs.get("tokenizer_kwargs") or {}), "markup": "all"}
        try:
            output: Any = super().apply_chat_template(messages, *args, tokenize=tokenize, **kwargs)
        except Exception as error:
            if type(error).__name__ != "TemplateError":
                raise
            # Servers catch jinja's error, and callers of ours a ValueError.
            raise type("MessageError", (ValueError, type(error)), {})(str(error)) from None
        if return_assistant_tokens_mask:
            if not isinstance(output, BatchEncoding):
                raise ValueError("assistant masks need tokenize=True and return_dict=True")
            masks = {"assistant_masks": self._assistant_masks(output["input_ids"])}
            output.update(BatchEncoding(masks, tensor_type=kwargs.get("return_tensors")))
        return output

    def _escape(self, value: Any) -> Any:
        """A copy of messages in which no special token's text is left in one piece."""
        if isinstance(value, dict):
            return {key: self._escape(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._escape(item) for item in value]
        if not isinstance(value, str):
            return value
        special = {*self._marks("all")}.difference(self._marks("none"))
        pattern = marks_pattern(tuple(sorted(mark for mark in special if len(mark) > 1))).pattern
        # Found by looking ahead, because two of them may overlap.
        return re.sub(f"(?s)(?={pattern}).", rf"\g<0>{ESCAPE}", value.replace(ESCAPE, ESCAPE * 2))

    def _assistant_masks(self, input_ids: Any) -> list[Any]:
        """1 for the tokens of an answer and 0 for all others, for one row or several."""
        rows = input_ids if isinstance(input_ids, list) else input_ids.tolist()
        if rows and isinstance(rows[0], list):
            return [self._assistant_masks(row) for row in rows]
        border = rows.index(self.bos_token_id) + 1 if self.bos_token_id in rows else len(rows)
        return [0] * border + [int(index != self.pad_token_id) for index in rows[border:]]

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the vocabulary file byte for byte as it was read, and return its path.

        The folder is made if it is not there; a prefix goes in front of the name, with a hyphen.
        """
        name = VOCAB_FILES_NAMES["vocab_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._vocab_content)
        return (str(path),)
