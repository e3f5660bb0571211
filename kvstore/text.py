"""Text to tokens and back: the tokeniser of a model, and streams that turn tokens into text as they arrive.

The router uses it for every client; a worker only for clients that talk to its public model directly.
"""

import codecs
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers


class Tokenizer:
    """A Hugging Face fast tokeniser, with a byte table for byte-level vocabularies. Immutable: threads may share it."""

    def __init__(self, tokenizer_json: str) -> None:
        """Raises ValueError for a document that is no `tokenizer.json`."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
            spec: dict[str, Any] = json.loads(tokenizer_json)
        except Exception as error:  # noqa: BLE001 - the binding raises bare Exception for whatever it cannot read
            raise ValueError(f"tokenizer.json cannot be read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._byte_level = _ends_in_byte_level(spec.get("decoder"))
        self.special_ids = frozenset(int(t["id"]) for t in spec.get("added_tokens", ()) if t.get("special"))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """From a model's files by name. Raises ValueError without a usable `tokenizer.json`."""
        if "tokenizer.json" not in files:
            raise ValueError("the model has no tokenizer.json: save it with a fast tokeniser")
        return cls(files["tokenizer.json"].decode())

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> bytes:
        """Token ids of `text`: native (little-endian) uint32, shape [tokens]."""
        return array("I", self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids).tobytes()

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The whole text at once. Ids outside the vocabulary have no text."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for (a part of a character, possibly); empty for an unknown id."""
        if self._byte_level:
            return self._byte_table[token_id] if 0 <= token_id < len(self._byte_table) else b""
        return self.decode([token_id], skip_special_tokens=False).encode()

    def stream(
        self, skip_special_tokens: bool = True, stop: Sequence[str] = (), include_stop: bool = False
    ) -> "TextStream":
        """A stream for one sequence of generated tokens."""
        decoder: _ByteDecoder | _LibraryDecoder
        if self._byte_level:
            decoder = _ByteDecoder(self._plain_byte_table if skip_special_tokens else self._byte_table)
        else:
            decoder = _LibraryDecoder(self._tokenizer, skip_special_tokens)
        return TextStream(decoder, stop, include_stop)

    @cached_property
    def _byte_table(self) -> list[bytes]:
        pieces = (self._tokenizer.id_to_token(i) for i in range(self.vocab_size))
        return [b"" if piece is None else _piece_bytes(piece) for piece in pieces]

    @cached_property
    def _plain_byte_table(self) -> list[bytes]:
        return [b"" if i in self.special_ids else piece for i, piece in enumerate(self._byte_table)]


class TextStream:
    """Turns tokens into text as they come, ends at a stop string, and never gives out half a character."""

    __slots__ = ("_decoder", "_held", "_include_stop", "_longest", "_stop", "stopped", "tokens")

    def __init__(self, decoder: "_ByteDecoder | _LibraryDecoder", stop: Sequence[str], include_stop: bool) -> None:
        self._decoder = decoder
        self._stop = tuple(s for s in stop if s)
        self._longest = max(map(len, self._stop), default=0)
        self._include_stop = include_stop
        self._held = ""
        """End of the text so far that may yet turn out to begin a stop string."""
        self.stopped: str | None = None
        """The stop string that was found; after it the stream takes nothing more."""
        self.tokens = 0
        """Tokens taken, the one that completed a stop string included."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain."""
        if not self._stop:
            self.tokens += len(token_ids)
            return self._decoder.feed(token_ids)
        text = ""
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.tokens += 1
            text += self._release(self._decoder.feed((token_id,)))
        return text

    def flush(self) -> str:
        """The text still held back at the end of the sequence; an incomplete character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        tail = self._decoder.flush()
        text = self._release(tail) if self._stop else tail
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        found = min(((at, s) for s in self._stop if (at := text.find(s)) >= 0), default=None)
        if found is not None:
            at, self.stopped = found
            self._held = ""
            return text[: at + len(self.stopped)] if self._include_stop else text[:at]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0


class _ByteDecoder:
    """Looks bytes up; about 0.1 us a token."""

    __slots__ = ("_table", "_utf8")

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Iterable[int]) -> str:
        table, size = self._table, len(self._table)
        return self._utf8.decode(b"".join([table[i] for i in token_ids if 0 <= i < size]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _LibraryDecoder:
    """`tokenizers`' own stream, for vocabularies whose pieces depend on their neighbours (SentencePiece)."""

    __slots__ = ("_pending", "_skip", "_stream", "_tokenizer")

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = tokenizers.decoders.DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []

    def feed(self, token_ids: Iterable[int]) -> str:
        text = ""
        for token_id in token_ids:
            piece = self._stream.step(self._tokenizer, token_id)
            if piece is None:
                self._pending.append(token_id)
            else:
                self._pending.clear()
                text += piece
        return text

    def flush(self) -> str:
        rest, self._pending = self._pending, []
        return str(self._tokenizer.decode(rest, skip_special_tokens=self._skip)) if rest else ""


def _ends_in_byte_level(decoder: dict[str, Any] | None) -> bool:
    return decoder is not None and decoder.get("type") == "ByteLevel"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the rest for U+0100 onwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_of_character()


def _piece_bytes(piece: str) -> bytes:
    """A piece outside the alphabet (an added token) stands for its own text."""
    try:
        return bytes([_BYTE_OF[c] for c in piece])
    except KeyError:
        return piece.encode()
