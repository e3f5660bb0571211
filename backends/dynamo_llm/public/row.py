"""How a request's tensors are read: `check` and `batch_size` for all of them, `Row` for those of one prompt.

Everything here raises `ServiceError` for what a client got wrong. `request.py` and `trtllm.py` are the callers.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dynamo_llm.public.tensors import INPUTS, MAX_BATCH_SIZE
from dynamo_llm.service import ServiceError

MAX_WORDS = 64
"""Stop words, or bad words, of one kind."""
MAX_WORD_BYTES = 4096
MAX_WORD_TOKENS = 1024
_KINDS: dict[Any, tuple[str, str]] = {
    np.bytes_: ("OS", "BYTES"),
    np.bool_: ("b", "BOOL"),
    np.int32: ("iu", "integers"),
    np.uint64: ("iu", "integers"),
    np.float32: ("f", "floating-point numbers"),
}
_DTYPES = {name: dtype for name, dtype, _ in INPUTS}


def refuse(message: str) -> NoReturn:
    raise ServiceError("invalid_request", message)


def check(tensors: Mapping[str, Any]) -> None:
    """Names and kinds of dtype. Where a Triton server is in front, it has checked the same."""
    for name, array in tensors.items():
        if name not in _DTYPES:
            near = difflib.get_close_matches(name[:64], _DTYPES, n=1)
            refuse(f"unexpected input {name[:64]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        kinds, said = _KINDS[_DTYPES[name]]
        if array.dtype.kind not in kinds:
            refuse(f"{name} must be {said}, not {array.dtype}")


def batch_size(tensors: Mapping[str, Any]) -> int | None:
    """How many prompts are in a request whose tensors have the batch in front; None: they do not.

    The prompt's rank decides, and the other tensors must share the batch.
    """
    given = [name for name in ("text_input", "input_ids") if name in tensors]
    if len(given) != 1:
        refuse("give either text_input or input_ids")
    prompt = tensors[given[0]]
    if prompt.ndim < 2:
        return None
    if prompt.ndim > 2:
        refuse(f"{given[0]} has {prompt.ndim} dimensions")
    size = int(prompt.shape[0])
    if not 1 <= size <= MAX_BATCH_SIZE:
        refuse(f"a batch is 1 to {MAX_BATCH_SIZE} prompts, not {size}")
    for name, array in tensors.items():
        if array.ndim < 2 or array.shape[0] != size:
            refuse(f"{name} of shape {list(array.shape)} does not have the batch of {size} that {given[0]} has")
    return size


class Row:
    """The part of a request's tensors that belongs to one prompt."""

    def __init__(self, tensors: Mapping[str, Any], index: int | None = None) -> None:
        """`index` is that of the prompt in the batch; None: the tensors have no batch in front."""
        self.index = index
        self._tensors = tensors

    def array(self, name: str) -> npt.NDArray[Any] | None:
        array = self._tensors.get(name)
        return None if array is None else np.asarray(array if self.index is None else array[self.index])

    def one(self, name: str) -> Any:
        """The only element as a Python value; None where the tensor is not given."""
        array = self.array(name)
        if array is None:
            return None
        if array.size != 1:
            refuse(f"{name} must have one element, not {array.size}")
        value = array.reshape(-1)[0]
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, float) and not math.isfinite(value):
            refuse(f"{name} must be a finite number")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.one(name)
        return None if value is None else bool(value)

    def text(self, name: str) -> str | None:
        value = self.one(name)
        return None if value is None else _text(name, value)

    def texts(self, name: str, most: int = MAX_WORDS) -> list[str]:
        array = self.array(name)
        if array is None:
            return []
        if array.size > most:
            refuse(f"{name} has {array.size} elements, {most} are allowed")
        if any(len(value) > MAX_WORD_BYTES for value in array.reshape(-1)):
            refuse(f"{name} has an element of more than {MAX_WORD_BYTES} bytes")
        return [_text(name, value) for value in array.reshape(-1)]

    def words(self, name: str, vocab_size: int) -> list[tuple[int, ...]]:
        """tensorrtllm_backend's word lists, shape [2, n]: the token ids of all words, and where each word ends."""
        array = self.array(name)
        if array is None or array.size == 0:
            return []
        if array.ndim != 2 or len(array) != 2:
            refuse(f"{name} must have the shape [2, n]: token ids, and the offset behind each word")
        if array.shape[1] > MAX_WORDS * MAX_WORD_TOKENS:
            refuse(f"{name} has {array.shape[1]} tokens, {MAX_WORDS * MAX_WORD_TOKENS} are allowed")
        ids, ends = array.tolist()
        ends = [end for end in ends if end != -1]
        if len(ends) > MAX_WORDS:
            refuse(f"{name} has {len(ends)} words, {MAX_WORDS} are allowed")
        starts = [0, *ends[:-1]]
        if any(
            not 0 < end - start <= MAX_WORD_TOKENS or end > len(ids) for start, end in zip(starts, ends, strict=True)
        ):
            refuse(f"{name}: offsets must grow, by at most {MAX_WORD_TOKENS}, up to the number of tokens")
        used = ids[: ends[-1]] if ends else []
        if wrong := [token for token in used if not 0 <= token < vocab_size]:
            refuse(f"{name} has the token id {wrong[0]}; the model has 0 to {vocab_size - 1}")
        return [tuple(ids[start:end]) for start, end in zip(starts, ends, strict=True)]


def _text(name: str, value: Any) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        refuse(f"{name} is no UTF-8")
