"""Text to ids and back, for every generation of ChatGLM-6B.

Owns: which texts are tokens of their own, how white space becomes pieces, how an input is closed,
and how a rendered chat becomes ids. Piece `k` of the file has id `k + num_image_tokens`; no id is
written down here.

Does not know: the model, the prompt format (chat_template.jinja), the rules of masks and positions
(masking_chatglm), what a vocabulary file is made of (vocabulary_chatglm).

Shapes: `B` batch, `S` tokens.
"""

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import logging

from .environment_chatglm import find_settled, is_streaming
from .masking_chatglm import SpecialIds, build_geometry
from .vocabulary_chatglm import LONGEST_BLANK, SPECIAL_TEXTS, WHITESPACE, complete_vocabulary

VOCAB_FILES_NAMES = {"vocab_file": "ice_text.model"}

# What chat_template.jinja writes between a prompt and its answer, and behind the answer.
BORDER, END = ("[gMASK]", "<sop>"), "<eop>"
UNFINISHED_CHAT = (
    "A text has [gMASK]<sop> in it and ends otherwise: it is bare text, no rendered chat. For the "
    "beginning of an answer behind it, call apply_chat_template(tokenize=True)."
)
logger = logging.get_logger(__name__)
ESCAPE = "\ufdd0"  # a Unicode noncharacter, which no text meant for interchange contains
ESCAPED = re.compile(f"{ESCAPE}(.)", re.DOTALL)
# What an answer has in it that would be taken for the template's own, with escapes or without.
FALSE_MARK = re.compile(rf"(?<=\[gMASK\]){ESCAPE}*(?=<sop>)|(?<=<){ESCAPE}*(?=eop>\s*\Z)")
SPACES = re.compile(" {2,}")
# What would come out as white space: tags like `<n>`, also in letters that SentencePiece reads as
# these, and its own sign of a space. Parted, or in bytes, they stay.
TAG = re.compile("[<\ufe64\uff1c][^<>\ufe64\ufe65\uff1c\uff1e]+[>\ufe65\uff1e]")
PARTING = "\ud800"  # a lone surrogate, which has no encoding
TYPED = {PARTING: (), "\u2581": tuple(f"<0x{byte:02X}>" for byte in "\u2581".encode())}
TEXT_PARTS = ("text", "input_text", "output_text")  # as the template has them


@lru_cache(maxsize=64)
def _marks_pattern(marks: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the marks in a text, the longest first; with no marks it finds nothing."""
    choices = [re.escape(mark) for mark in sorted(marks, key=len, reverse=True)]
    return re.compile(f"({'|'.join(choices) or '(?!)'})")


def _name_spaces(match: re.Match[str]) -> str:
    """Pieces for a run of two or more spaces; a single space that is left over stays."""
    full, rest = divmod(len(match.group()), LONGEST_BLANK)
    return f"<|blank_{LONGEST_BLANK}|>" * full + (f"<|blank_{rest}|>" if rest > 1 else " " * rest)


def _read_messages(value: Any) -> Any:
    """A copy of messages, or of a part of one, with contents in one piece, as in the template."""
    value = getattr(value, "messages", value)  # a batch may hold objects with messages
    if isinstance(value, (list, tuple)):
        return [_read_messages(item) for item in value]
    if hasattr(value, "__dict__") and not isinstance(value, (str, Mapping)):
        value = vars(value)
    if not isinstance(value, Mapping):
        return value if isinstance(value, (str, int, float)) else None  # 5 would show their types
    fields = dict(value)
    fields.update(
        {key: _read_messages(fields[key]) for key in ("content", "text") if key in fields}
    )
    parts = fields.get("content")
    if isinstance(parts, list) and parts:
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in parts]
        kinds = [part.get("type") or "text" for part in parts if isinstance(part, dict)]
        if all(isinstance(text, str) for text in texts) and all(k in TEXT_PARTS for k in kinds):
            fields["content"] = "".join(texts)
    return fields


def _check_messages(messages: list[Any], is_shown: bool) -> None:
    """Refuse what is no message; change an answer that is shown at the end as `FALSE_MARK` says."""
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} must be a dictionary with 'role' and 'content'")
    last = messages[-1] if messages else {}
    if is_shown and last.get("role") == "assistant" and isinstance(last.get("content"), str):
        last["content"] = FALSE_MARK.sub(rf"\g<0>{ESCAPE}", last["content"])


def _part_typed(match: re.Match[str]) -> str:
    """A tag, parted behind its first sign if SentencePiece would take it for white space."""
    plain = unicodedata.normalize("NFKC", match[0]).lower()
    is_piece = "".join(filter(str.isprintable, plain)) in WHITESPACE
    return match[0][0] + PARTING * is_piece + match[0][1:]


class _Sides(NamedTuple):
    """What a mark does to the text beside it."""

    strips_left: bool = False
    strips_right: bool = False
    is_added: bool = False


class ChatGLMTokenizer(PreTrainedTokenizer):
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
        markup = kwargs.get("markup") or ("none" if plain else "named")
        if markup == "named" and "".join(BORDER) in text:
            if text.endswith(("".join(BORDER), END)):
                return self._tokenize_chat(text)
            logger.warning_once(UNFINISHED_CHAT)
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no encoding
        text = text if markup == "named" else TAG.sub(_part_typed, text)
        parts = _marks_pattern(self._marks(markup)).split(text)  # text, mark, text, ..., mark, text
        if markup == "all":
            parts[::2] = [ESCAPED.sub(r"\1", part) for part in parts[::2]]
        sides = {mark: self._sides(mark, markup) for mark in set(parts[1::2])}
        edges = [_Sides(), *(sides[mark] for mark in parts[1::2]), _Sides()]
        fragments = map(self._prepare_fragment, parts[::2], edges, edges[1:])
        encoded = self._processor.encode([*fragments], out_type=str, num_threads=1)
        tokens: list[str] = []
        for pieces, left, right, mark in zip(encoded, edges, edges[1:], [*parts[1::2], ""]):
            start = pieces.index("<n>") + 1 if left.is_added else 0
            tokens += pieces[start : len(pieces) - right.is_added]
            tokens += TYPED.get(mark, [mark] if mark else [])
        return tokens

    def _tokenize_chat(self, text: str) -> list[str]:
        """Tokens of a rendered chat: its last border and an end behind that, else text."""
        prompt, _, answer = text.rpartition("".join(BORDER))
        answer, end = (answer[: -len(END)], [END]) if answer.endswith(END) else (answer, [])
        answer = FALSE_MARK.sub(lambda match: match[0][1:], answer)
        texts = [self.tokenize(part, markup="none") for part in (prompt, answer)]
        return [*texts[0], *BORDER, *texts[1], *end]

    def _marks(self, markup: str) -> tuple[str, ...]:
        """Texts that are tokens of their own.

        With "named" the special tokens of the base class and all added tokens, with "none" added
        tokens that are not special, with "all" every special and added token.
        """
        added = self.added_tokens_decoder.values()
        marks = [token.content for token in added if markup != "none" or not token.special]
        marks += [] if markup == "named" else TYPED
        return (*marks, *SPECIAL_TEXTS) if markup == "all" else tuple(marks)

    def _sides(self, mark: str, markup: str) -> _Sides:
        """What a mark does to the text beside it."""
        if mark in TYPED:
            return _Sides(is_added=True)
        index = self.get_added_vocab().get(mark, 0)
        if index >= self.vocab_size:
            token = self.added_tokens_decoder[index]
            return _Sides(token.lstrip, token.rstrip, is_added=True)
        # The original lost white space beside its special tokens; a template means what it says.
        return _Sides(markup == "named", markup == "named")

    def _prepare_fragment(self, text: str, left: _Sides, right: _Sides) -> str:
        """Put the white space between two marks into pieces.

        SentencePiece adds a space in front of a text and drops those behind it. A line break beside
        an added token, which `tokenize` drops again, keeps it from that: "a<new>b" comes back so.
        """
        text = text.lstrip() if left.strips_right else text
        text = text.rstrip() if right.strips_left else text
        text = " ".join(text.split()) if self.remove_space else text
        text = text.lower() if self.do_lower_case else text
        text = SPACES.sub(_name_spaces, text.replace("\n", "<n>").replace("\t", "<|tab|>"))
        return "<n>" * left.is_added + text + "<n>" * right.is_added

    def prepare_for_model(
        self, ids: list[int], pair_ids: Any = None, add_special_tokens: bool = True, **kwargs: Any
    ) -> BatchEncoding:
        """As in the base class, but a rendered chat has its border already."""
        border = (self._vocab[BORDER[0]], self._vocab[BORDER[1]])
        if add_special_tokens and pair_ids is not None and tuple(ids[-2:]) == border:
            ids = ids[:-2]
        elif border in [*pairwise(ids)]:
            add_special_tokens = False
        return super().prepare_for_model(ids, pair_ids, add_special_tokens, **kwargs)

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

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """Text of ids. Image ids and ids out of range are no text, and no error."""
        ids = [token_ids] if isinstance(token_ids, int) else map(int, token_ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        if self._is_first_generation:
            skipped.discard(self.num_image_tokens)  # its decode showed `<unk>` in any case
        shown = [index for index in ids if index >= self.num_image_tokens and index not in skipped]
        text = self.convert_tokens_to_string(self.convert_ids_to_tokens(shown))
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Close an input: `A [gMASK] <sop>` for a prompt, `A [gMASK] <sop> B <eop>` with an answer.

        The first generation leaves out `[gMASK]` if `A` has a mask already, and puts `</s>` in its
        place if `A` does not end with that mask. The lists stay as they are.
        """
        masks = {self.mask_token_id, self.gmask_token_id}
        if not self._is_first_generation or masks.isdisjoint(token_ids_0):
            border = [self.gmask_token_id]
        else:
            border = [] if token_ids_0[-1] in masks else [self.end_token_id]
        answer = [] if token_ids_1 is None else [*token_ids_1, self.eop_token_id]
        return [*token_ids_0, *border, self.bos_token_id, *answer]

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
        messages = _read_messages(conversation)
        if not messages or not isinstance(messages, list):
            raise ValueError("the conversation is empty or none; give a list of messages")
        for chat in messages if isinstance(messages[0], list) else [messages]:
            _check_messages(chat, is_shown=not tokenize)
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
        pattern = _marks_pattern(tuple(sorted(mark for mark in special if len(mark) > 1))).pattern
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
