"""Text streams against the tokenizers library itself, on the demo model's vocabulary."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from kvstore.text import Tokenizer

DEMO = Path(__file__).parents[2] / "model_repository/demo/1/model/tokenizer.json"
TOKENIZER = Tokenizer(DEMO.read_text())
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=60)


def ids_of(text: str) -> list[int]:
    return memoryview(TOKENIZER.encode(text)).cast("I").tolist()


def sentencepiece() -> Tokenizer:
    """A small vocabulary of the Llama 2 kind: pieces with U+2581 for the space, bytes as a fallback."""
    vocabulary = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    for piece in ("▁", "a", "b", "▁a", "ab"):
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "a"), ("a", "b")]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    return Tokenizer(made.to_str())


@given(ids=IDS, skip=st.booleans())
def test_pieces_add_up_to_the_whole_text(ids: list[int], skip: bool) -> None:
    """Fed one by one, any tokens give the text that the library decodes at once."""
    stream = TOKENIZER.stream(skip_special_tokens=skip)
    text = "".join(stream.feed([i]) for i in ids) + stream.flush()
    assert text == TOKENIZER.decode(ids, skip_special_tokens=skip)


@given(text=st.text(st.sampled_from("aé€😀 \n"), max_size=40), data=st.data())
def test_no_half_characters(text: str, data: st.DataObject) -> None:
    """However the tokens of a text are cut into frames, no delta holds a replacement character."""
    ids, stream, seen = ids_of(text), TOKENIZER.stream(), ""
    while ids:
        count = data.draw(st.integers(1, len(ids)))
        delta = stream.feed(ids[:count])
        assert "�" not in delta
        seen, ids = seen + delta, ids[count:]
    assert seen + stream.flush() == text


@given(
    text=st.text(st.sampled_from("ab<>/"), max_size=30),
    stop=st.lists(st.text(st.sampled_from("ab<>/"), min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings_that_span_tokens(text: str, stop: list[str], include: bool) -> None:
    """The text ends at the earliest stop string; without one, nothing is lost."""
    stream = TOKENIZER.stream(stop=stop, include_stop=include)
    seen = "".join(stream.feed([i]) for i in ids_of(text)) + stream.flush()
    if stream.stopped is None:
        assert not any(s in text for s in stop)
        assert seen == text
    else:
        cut = text.find(stream.stopped)
        assert seen == text[: cut + len(stream.stopped) * include]
        assert not any(s in seen[: len(seen) - len(stream.stopped) * include] for s in stop)


def test_tokens_after_a_stop_are_not_taken() -> None:
    """A frame that runs past the stop string counts only the tokens up to it."""
    ids = ids_of("one two three")
    stream = TOKENIZER.stream(stop=["two"])
    assert stream.feed(ids) == "one "
    assert stream.stopped == "two"
    assert stream.tokens < len(ids)
    assert stream.feed([300]) == ""
    assert stream.flush() == ""


@given(text=st.text(st.sampled_from("ab é€"), max_size=20))
def test_sentencepiece_vocabularies(text: str) -> None:
    """Vocabularies that are not byte-level go through the library's own stream, with the same outcome."""
    tokenizer = sentencepiece()
    ids = memoryview(tokenizer.encode(text)).cast("I").tolist()
    stream = tokenizer.stream()
    assert "".join(stream.feed([i]) for i in ids) + stream.flush() == tokenizer.decode(ids)


def test_bytes_of_tokens() -> None:
    """A token's bytes are its own text's, and an unknown id has none."""
    assert b"".join(TOKENIZER.token_bytes(i) for i in ids_of("a € sign")) == "a € sign".encode()
    assert TOKENIZER.token_bytes(10**6) == b""
    assert TOKENIZER.token_bytes(0) == b"<|begin|>"


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": b"{"}, {"tokenizer.json": b"[]"}])
def test_unusable_files(files: dict[str, bytes]) -> None:
    """A model without a readable tokenizer.json is refused with one line."""
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_files(files)
    assert "\n" not in str(caught.value)
