"""Calls of a tokenizer that go in one batch: their options, and rows closed, truncated and padded.

Owns: the options that a batch takes, and their rules where transformers leaves nothing to guess.
What is rarer, and what transformers warns of or refuses, it does itself, text by text: the slow
road gives the same rows, and every option.

Does not know: pieces, or how an input is closed.

Shapes: `B` batch, `S` tokens of the longest row.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import BatchEncoding

from .offsets_chatglm import NOWHERE, read_spans

SOME_PADDING = ("longest", "max_length")
PADDING = {False: "", "do_not_pad": "", True: "longest", **{name: name for name in SOME_PADDING}}
SOME_TRUNCATION = ("longest_first", "only_first", "only_second")
NO_TRUNCATION = dict.fromkeys((None, False, "do_not_truncate"), "")
TRUNCATION = {True: "longest_first", **NO_TRUNCATION, **{name: name for name in SOME_TRUNCATION}}
# What a base class takes for granted and a batch has no use for, with the values that say so.
IDLE = {
    "text_target": (None,),
    "text_pair_target": (None,),
    "stride": (0,),
    "return_token_type_ids": (None, False),
    "return_overflowing_tokens": (False,),
    "return_length": (False,),
    "verbose": (True, False),
}

NO_OFFSETS = (
    "return_offsets_mapping goes with texts and lists of texts, padding, truncation and masks, not "
    "with ids, lists of pairs or return_overflowing_tokens; got {}. Give texts and their pairs as "
    "two lists, text and text_pair."
)


class BatchOptions(NamedTuple):
    """What is done with the rows of a batch, by the names of transformers."""

    add_special_tokens: bool = True
    padding: Any = False
    truncation: Any = None
    max_length: int | None = None
    is_split_into_words: bool = False
    pad_to_multiple_of: int | None = None
    padding_side: str | None = None
    return_tensors: Any = None
    return_attention_mask: bool | None = None
    return_special_tokens_mask: bool = False
    return_offsets_mapping: bool = False
    split_special_tokens: bool | None = None
    markup: str | None = None


def read_options(options: Mapping[str, Any]) -> BatchOptions | None:
    """The options of a call, with paddings and truncations by one name each.

    Returns:
        None where one of them is for the slow road.
    """
    known = {name: value for name, value in options.items() if name not in IDLE}
    idle = all(options[name] in values for name, values in IDLE.items() if name in options)
    if not idle or not known.keys() <= set(BatchOptions._fields):
        return None
    read = BatchOptions(**known)
    try:
        padding, truncation = PADDING.get(read.padding), TRUNCATION.get(read.truncation)
    except TypeError:  # of a value that cannot be looked up
        return None
    if padding is None or truncation is None or not _has_lengths(read, padding, truncation):
        return None
    return read._replace(padding=padding, truncation=truncation)


def _has_lengths(options: BatchOptions, padding: str, truncation: str) -> bool:
    """Whether a length is given where one is asked for, and nowhere else, and all of them fit."""
    length, multiple = options.max_length, options.pad_to_multiple_of
    if (length is not None) != bool(truncation or padding == "max_length"):
        return False
    if any(type(number) is not int or number < 1 for number in (length or 1, multiple or 1)):
        return False
    if truncation and padding and multiple and (length or 0) % multiple:
        return False
    return length != 0 and options.padding_side in (None, "left", "right")


def as_batch(text: Any, text_pair: Any, in_words: bool) -> tuple[list[Any], Any, bool] | None:
    """The texts of a call and their pairs, and whether it was a batch.

    Returns:
        None for what is no text or list of texts (with `in_words`, of lists of words), and for
        ids: these are for the slow road.
    """
    is_batch = _is_list(text, in_words + 1) and len(text) > 0
    if not is_batch and not (_is_list(text, int(in_words)) and (text or not in_words)):
        return None
    texts = list(text) if is_batch else [text]
    pairs = text_pair if is_batch else [text_pair]
    if text_pair is not None and not (_is_list(pairs, in_words + 1) and len(pairs) == len(texts)):
        return None
    return texts, None if text_pair is None else list(pairs), is_batch


def _is_list(value: Any, depth: int) -> bool:
    """Whether a value is a text in that many lists; a tuple is a pair to some releases."""
    if not depth:
        return isinstance(value, str)
    if not isinstance(value, list) or (depth > 1 and not all(value)):
        return False
    return all(_is_list(item, depth - 1) for item in value)


def find_length(rows: list[list[int]], options: BatchOptions) -> int:
    """The length that the rows of a batch are padded to; 0 if they stay as they are."""
    if not options.padding:
        return 0
    length = max(map(len, rows), default=0)
    if options.padding == "max_length":
        length = options.max_length or length
    multiple = options.pad_to_multiple_of or 1
    return -(-length // multiple) * multiple


def pad_rows(rows: list[list[Any]], length: int, side: str, filler: Any) -> list[list[Any]]:
    """Rows of at least that length, filled up on one side; those that are longer stay."""
    if side == "left":
        return [[filler] * (length - len(row)) + row for row in rows]
    return [row + [filler] * (length - len(row)) for row in rows]


class BatchMixin:
    """What a tokenizer does with a batch, beside the class of transformers."""

    def __call__(
        self: Any, text: Any = None, text_pair: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the base class, with one call of SentencePiece for a whole batch of texts.

        `return_offsets_mapping` gives the characters of each token, as tokenizers in Rust do, and
        (0, 0) for tokens that no text has. What `read_options` does not take goes the base class's
        way, text by text.

        Raises:
            ValueError: for offsets of what goes that way.
        """
        options = None if args else read_options(kwargs)
        batch = options and as_batch(text, text_pair, options.is_split_into_words)
        if not options or not batch or not self._is_usual(options):
            if kwargs.get("return_offsets_mapping"):
                raise ValueError(NO_OFFSETS.format(", ".join(kwargs)))
            base: Any = super()
            return base.__call__(text, text_pair, *args, **kwargs)
        texts, pairs, is_batch = batch
        rows, pair_rows = (side and self._encode_side(side, options) for side in (texts, pairs))
        columns = self._close_rows(rows, pair_rows, options)
        self._warn_of_length(columns["input_ids"], options)
        columns = self._pad_columns(columns, options)
        if not is_batch and options.return_tensors is None:
            return BatchEncoding({name: rows[0] for name, rows in columns.items()})
        return BatchEncoding(columns, tensor_type=options.return_tensors)

    def _encode_side(self: Any, texts: list[Any], options: BatchOptions) -> list[list[int]]:
        """Ids of every text, or of every list of words, which are encoded word by word."""
        plain = options.split_special_tokens
        plain = self.split_special_tokens if plain is None else plain
        markup = options.markup or ("none" if plain else "named")
        encode = self._encode_placed if options.return_offsets_mapping else self._encode_texts
        if not options.is_split_into_words:
            return encode(texts, markup)
        encoded = iter(encode([word for words in texts for word in words], markup))
        return [[index for _ in words for index in next(encoded)] for words in texts]

    def _is_usual(self: Any, options: BatchOptions) -> bool:
        """Whether the tokenizer itself is as a batch needs it."""
        return self.model_input_names[0] == "input_ids" and not (
            options.padding and self.pad_token is None
        )

    def _warn_of_length(self: Any, rows: list[list[int]], options: BatchOptions) -> None:
        """Have the base class say, once, that a row is longer than the model takes."""
        longest = max(rows, key=len)
        if options.max_length is None and len(longest) > self.model_max_length:
            self.prepare_for_model(longest, add_special_tokens=False)

    def _close_rows(
        self: Any, rows: list[list[int]], pairs: list[list[int]] | None, options: BatchOptions
    ) -> dict[str, list[list[Any]]]:
        """Rows as `prepare_for_model` gives them, and the masks of their special tokens."""
        columns: dict[str, list[list[Any]]] = {"input_ids": []}
        build, masks = self.build_inputs_with_special_tokens, self._masks()
        border = build([])  # of every text without a mask of its own
        added = [self.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
        for ids, pair_ids in zip(rows, pairs or [None] * len(rows)):
            ids, closes = self._open(ids, pair_ids is not None, options.add_special_tokens)
            length = len(ids) + len(pair_ids or ()) + closes * added[pair_ids is not None]
            if options.truncation and options.max_length and length > options.max_length:
                ids, pair_ids, _ = self.truncate_sequences(
                    ids, pair_ids, length - options.max_length, options.truncation
                )
            if closes and pair_ids is None and masks.isdisjoint(ids):
                row = ids + border
            else:
                row = build(ids, pair_ids) if closes else ids + (pair_ids or [])
            columns["input_ids"].append(row)
            if options.return_offsets_mapping:
                columns.setdefault("offset_mapping", []).append(read_spans(row))
                columns["input_ids"][-1] = [*map(int, row)]
            if options.return_special_tokens_mask:
                mask = self.get_special_tokens_mask(ids, pair_ids) if closes else [0] * len(row)
                columns.setdefault("special_tokens_mask", []).append(mask)
        return columns

    def _pad_columns(
        self: Any, columns: dict[str, list[list[Any]]], options: BatchOptions
    ) -> dict[str, list[list[Any]]]:
        """The columns of a batch with rows of one length, if that is asked for, and their mask."""
        wants_mask = options.return_attention_mask
        if wants_mask is None:
            wants_mask = "attention_mask" in self.model_input_names
        if wants_mask:
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        length, side = find_length(columns["input_ids"], options), self.padding_side
        side = options.padding_side or side
        fillers = {"input_ids": self.pad_token_id, "attention_mask": 0, "special_tokens_mask": 1}
        fillers["offset_mapping"] = NOWHERE
        return {
            name: pad_rows(rows, length, side, fillers[name]) if length else rows
            for name, rows in columns.items()
        }
