"""The players of a text: its words, each with all of its tokens."""

from typing import Any

import torch
from torch import Tensor

from .checks import describe


def word_ids_of(encoding: Any) -> Tensor:
    """Which word each token of a tokenizer's output is of.

    With `return_offsets_mapping=True` words are what spaces part; else what the tokenizer takes for words, which may
    part "it's" or a number into several.

    Args:
        encoding: what a fast tokenizer gives for a list of texts.

    Returns:
        Long (B, T), words from 0 on, -1 for tokens of no word: begin, end and padding.

    Raises:
        TypeError: the tokenizer is a slow one, which does not say where its tokens come from.
    """
    if "offset_mapping" in encoding:
        return torch.tensor([_by_spaces(row) for row in torch.as_tensor(encoding["offset_mapping"]).tolist()])
    if not getattr(encoding, "is_fast", False):
        raise TypeError(
            f"`encoding` must come from a fast tokenizer, got {describe(encoding)}: load it with `AutoTokenizer`, or "
            "make `word_ids` yourself."
        )
    rows = range(len(encoding["input_ids"]))
    return torch.tensor([[-1 if word is None else word for word in encoding.word_ids(row)] for row in rows])


def _by_spaces(offsets: list[list[int]]) -> list[int]:
    """Words of one text, from where its tokens begin and end: one that begins where the last ended is of its word."""
    words, word, last = [], -1, -1
    for start, end in offsets:
        if start == end:
            words.append(-1)
            continue
        if start != last:
            word += 1
        words.append(word)
        last = end
    return words


def check_text(input_ids: Any, attention_mask: Any, most: int, device: torch.device) -> None:
    """Refuse what are no ids of texts, or texts too long."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype != torch.long:
        raise ValueError(
            f"`input_ids` must be long of shape (texts, tokens), got {describe(input_ids)}: use the tokenizer with "
            '`return_tensors="pt"`.'
        )
    if 0 in input_ids.shape:
        raise ValueError(f"`input_ids` must hold at least one token, got shape {tuple(input_ids.shape)}: give a text.")
    if input_ids.shape[1] > most:
        raise ValueError(
            f"`input_ids` must have at most {most} tokens, `max_position_embeddings`, got {input_ids.shape[1]}: "
            f"shorten the text, or tokenize it with `truncation=True, max_length={most}`."
        )
    fits = isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape
    if attention_mask is not None and not fits:
        raise ValueError(
            f"`attention_mask` must be of the shape of `input_ids`, {tuple(input_ids.shape)}, got "
            f"{describe(attention_mask)}: take both from the same call of the tokenizer."
        )
    for name, tensor in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"`{name}` must be on {device}, got {tensor.device}: move it by `.to({str(device)!r})`.")


def check_word_ids(word_ids: Any, may_be_words: Tensor) -> int:
    """Refuse what are no words of the texts; return M, the number of words of the one that has most.

    Args:
        word_ids: long (B, T), -1 = of no word.
        may_be_words: bool (B, T).
    """
    shape = tuple(may_be_words.shape)
    if not isinstance(word_ids, Tensor) or word_ids.dtype != torch.long or tuple(word_ids.shape) != shape:
        raise ValueError(
            f"`word_ids` must be long of the shape of `input_ids`, {shape}, got {describe(word_ids)}: see "
            "`word_ids_of`."
        )
    num_words = int(word_ids.max()) + 1
    for row, (words, allowed) in enumerate(zip(word_ids.tolist(), may_be_words.tolist(), strict=True)):
        found = sorted({word for word in words if word != -1})
        if not found:
            raise ValueError(
                f"Text {row} has no words, `word_ids` wanted from 0 on, got -1 for every token: an empty text has "
                "nothing to explain, leave it out."
            )
        if found != list(range(len(found))):
            raise ValueError(
                f"`word_ids` of a text must be 0, 1, ... without a gap, and -1, got {found} in text {row}: see "
                "`word_ids_of`."
            )
        beyond = [place for place, word in enumerate(words) if word != -1 and not allowed[place]]
        if beyond:
            raise ValueError(
                f"`word_ids` must be -1 for the end of a text, for what comes after it and for padding, got words at "
                f"places {beyond[:5]} of text {row}: see `word_ids_of`."
            )
    return num_words
