"""The tokens that the mock engine gives: one long tape of a tokeniser's words, the same in every process.

An answer is a piece of the tape from a place that the prompt decides (`request.py`). So it goes on in the same words
when prompt and first tokens are replayed on another worker, and a token that is lost or comes twice shows.
"""

from functools import lru_cache
from pathlib import Path

from xxhash import xxh3_64_intdigest

from dynamo_llm.engines.base import EngineError
from kvstore.text import Tokenizer

BEGINNINGS = 1 << 16
"""An answer begins at one of the first places of the tape."""
_SHORTEST = 3
"""Letters of what passes for a word: shorter ones are mostly pieces."""


def pick_words(folder: Path, vocab_size: int, never: frozenset[int]) -> tuple[int, ...]:
    """Ids of tokens that are a space and a plain word each, so that each has whole text of its own.

    Where the tokeniser marks spaces otherwise: of plain words. Where it has none, or there is no `tokenizer.json`: all
    ids below `vocab_size`. Special tokens and those of `never` are not among them. Raises `EngineError`.
    """
    path = folder / "tokenizer.json"
    tokenizer = None
    if path.exists():
        try:
            tokenizer = Tokenizer(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EngineError(f"{path} cannot be read: {error}") from None
        never |= tokenizer.special_ids
    ids = [token for token in range(vocab_size) if token not in never]
    words = _words(tokenizer, ids) if tokenizer else ids
    if not words:
        raise EngineError(f"{folder} leaves the mock engine no token to give: all {vocab_size} are special")
    return tuple(words)


def _words(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    texts = [(token, _text(tokenizer, token)) for token in ids]
    plain = [(token, text) for token, text in texts if len(text.strip()) >= _SHORTEST and text.strip().isalpha()]
    spaced = [token for token, text in plain if text == " " + text.strip()]
    return spaced or [token for token, _ in plain] or ids


def _text(tokenizer: Tokenizer, token: int) -> str:
    """Empty for what is no whole text, like half a character."""
    try:
        return tokenizer.token_bytes(token).decode()
    except UnicodeDecodeError:
        return ""


@lru_cache(maxsize=4)
def make_tape(words: tuple[int, ...], max_context: int) -> list[int]:
    """Long enough for an answer of `max_context` tokens from every beginning. Shared by the instances of a process, and
    not to be changed. What stands at a place depends on the words only."""
    count = len(words)
    return [words[xxh3_64_intdigest(place.to_bytes(8, "little")) % count] for place in range(BEGINNINGS + max_context)]
