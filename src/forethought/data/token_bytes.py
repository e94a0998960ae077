"""Tokens -> bytes, where a token may end inside a character."""

import json
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from forethought.config import UserError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece vocabularies write a space


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
        self._pieces = _SPACE in decoder or '"Metaspace"' in decoder

    def token(self, token: int) -> bytes:
        """The bytes of a token."""
        if token in self._added:
            return self._added[token]
        written = self._tokenizer.convert_ids_to_tokens(token)
        if written is None:  # the output head has more rows than the tokenizer has tokens
            return b""
        if self._letters is not None:
            letters = self._letters
            return b"".join(letters[one] if one in letters else one.encode() for one in written)
        if self._pieces:
            if len(written) == 6 and written.startswith("<0x"):
                return bytes([int(written[3:5], 16)])
            return written.replace(_SPACE, " ").encode()
        return written[2:].encode() if written.startswith("##") else f" {written}".encode()
