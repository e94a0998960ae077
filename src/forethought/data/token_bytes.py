"""Tokens -> bytes, where a token may end inside a character; and when such bytes contain a closing delimiter."""

import copy
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from forethought.config import UserError
from forethought.data.corpus import SPACE


class TokenBytes:
    """The bytes of a tokenizer's tokens, so that texts can be compared where a token ends inside a character.

    Byte-level vocabularies (GPT-2, Llama 3, Qwen): the bytes that the letters of the token encode. SentencePiece
    vocabularies: UTF-8, including byte-fallback tokens. Word vocabularies: the word after a space, unless it continues
    a word. Added tokens, such as delimiters or the end of text: their names. Raises UserError for a slow tokenizer.
    """

    def __init__(self, tokenizer: Any):
        if not tokenizer.is_fast:
            raise UserError(
                f"model.tokenizer: method.name rpt compares bytes and takes a fast tokenizer, not a "
                f"{type(tokenizer).__name__}"
            )
        self._tokenizer = tokenizer
        self._added = {i: str(token).encode() for i, token in tokenizer.added_tokens_decoder.items()}
        decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"], ensure_ascii=False)
        byte_letters = {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}
        self._letters = byte_letters if '"ByteLevel"' in decoder else None
        self._pieces = SPACE in decoder or '"Metaspace"' in decoder

    def token(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.tokens([token])[0]

    def tokens(self, tokens: Iterable[int]) -> list[bytes]:
        """The bytes of each of some tokens."""
        tokens = list(tokens)
        return [self._bytes(*pair) for pair in zip(tokens, self._tokenizer.convert_ids_to_tokens(tokens), strict=True)]

    def _bytes(self, token: int, written: str | None) -> bytes:
        if token in self._added:
            return self._added[token]
        if written is None:  # the output head has more rows than the tokenizer has tokens
            return b""
        if self._letters is not None:
            letters = self._letters
            return b"".join(letters[one] if one in letters else one.encode() for one in written)
        if self._pieces:
            if len(written) == 6 and written.startswith("<0x"):
                return bytes([int(written[3:5], 16)])
            return written.replace(SPACE, " ").encode()
        return written[2:].encode() if written.startswith("##") else f" {written}".encode()


class Closing:
    """Decides token by token when the text of a thought contains its closing delimiter.

    An automaton: in state k the text ends with the first k letters of the delimiter, in state `done` it contains all
    of them. Tokens are compared by their bytes, so that `].` closes what `]` closes, and so do `</` `think` `>`.

    Attributes:
        table: the state after reading a token in a state. The last column is for every token beyond.
        first: tokens with which an empty thought closes, or begins to.
        ending: tokens that close a thought in some state.
        shortest: tokens that a thought has before it may close.
        early: tokens that may not be among the first `shortest`. From 2 on, also those that could close in any state.
    """

    table: Int[Tensor, "state token"]
    first: Int[Tensor, " first"]
    ending: Int[Tensor, " ending"]
    shortest: int
    early: Int[Tensor, " early"]
    _copies: dict[torch.device, "Closing"]

    def __init__(self, texts: Sequence[str], delimiter: str, close: Sequence[int]):
        """`texts` are those of all tokens, and of a token beyond; `close` is the delimiter as it is forced."""
        self.done, self._copies = len(delimiter), {}
        table = np.tile(np.array([_match(delimiter, text) for text in texts], dtype=np.int16), (self.done, 1))
        letters = set(delimiter)
        for token, text in enumerate(texts):
            if not text or text[0] in letters:  # after any other first letter the state is that of an empty text
                table[:, token] = [_match(delimiter, delimiter[:state] + text) for state in range(self.done)]
        ends = torch.from_numpy(table[:, :-1] == self.done)
        self.table = torch.from_numpy(np.vstack([table, np.full_like(table[:1], self.done)]))
        self.first = (ends[0] | (torch.arange(ends.shape[1]) == close[0])).nonzero().squeeze(-1)
        self.ending = (ends.any(0) | (torch.arange(ends.shape[1]) == close[-1])).nonzero().squeeze(-1)
        self.shortest, self.early = 1, self.first

    @classmethod
    def of_tokens(cls, close: Sequence[int]) -> "Closing":
        """Without texts: a thought closes with exactly these tokens."""
        beyond = max(close) + 1
        return cls([chr(token) for token in range(beyond + 1)], "".join(map(chr, close)), close)

    @classmethod
    def of_text(cls, tokenizer: Any, text: str, close: Sequence[int]) -> "Closing":
        """A thought closes when its text contains `text` (or what the tokenizer makes of it, such as lower case)."""
        vocabulary = range(max(tokenizer.get_vocab().values()) + 1)
        if tokenizer.is_fast:
            spelled = TokenBytes(tokenizer).tokens(vocabulary)
        else:
            spelled = [tokenizer.decode([token]).encode() for token in vocabulary]
        forced = b"".join(spelled[token] for token in close)
        wanted = text.encode() if text.encode() in forced else forced.strip()
        if not wanted:
            return cls.of_tokens(close)
        return cls([*(one.decode("latin-1") for one in spelled), ""], wanted.decode("latin-1"), close)

    def with_minimum(self, shortest: int) -> "Closing":
        """The same for thoughts that may close after `shortest` tokens."""
        found = copy.copy(self)
        found.shortest, found._copies = shortest, {}
        found.early = self.first if shortest < 2 else torch.cat([self.first, self.ending]).unique()
        return found

    def step(self, state: Int[Tensor, " row"], token: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """The state of each row after it has read a token; a thought is closed in state `done`."""
        return self.table[state, token.clamp(max=self.table.shape[1] - 1)].to(state.dtype)

    def to(self, device: torch.device) -> "Closing":
        """The same on a device, where it then stays."""
        if self.table.device == device:
            return self
        if device not in self._copies:
            moved = self._copies[device] = copy.copy(self)
            for name in ("table", "first", "early"):
                setattr(moved, name, getattr(self, name).to(device))
        return self._copies[device]

    def length(self, tokens: Sequence[int]) -> int | None:
        """How many of these tokens a thought has when it closes; None if it does not close."""
        state, table = 0, self.table.numpy()
        for count, token in enumerate(tokens, 1):
            state = table[state, min(token, table.shape[1] - 1)]
            if state == self.done:
                return count
        return None


def _match(delimiter: str, text: str) -> int:
    """The state after a text that is read from state 0."""
    if delimiter in text:
        return len(delimiter)
    return next((k for k in range(len(delimiter) - 1, 0, -1) if text.endswith(delimiter[:k])), 0)
