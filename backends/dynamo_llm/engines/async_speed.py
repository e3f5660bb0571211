"""How fast an engine is whose steps are not seen, only what comes out of them. Pure: times are passed in.

`async_engine.AsyncEngine` calls it for each turn of its loop that brought outputs.
"""

from dynamo_llm.engines.torch_engine.speed import Speed


class Pace:
    """Moving averages, as `Load` carries them; 0 means: not known yet."""

    def __init__(self) -> None:
        self._speed = Speed()
        self._last_s: float | None = None
        self._last_prefill_s = float("-inf")

    @property
    def prefill_tokens_per_s(self) -> float:
        return self._speed.prefill_tokens_per_s

    @property
    def decode_step_ms(self) -> float:
        return self._speed.decode_step_ms

    def turn(self, now_s: float, prefill_tokens: int, decode_tokens: int, submitted_s: float) -> float:
        """A turn brought these tokens; returns how long it took, in seconds.

        `prefill_tokens` are those of the prompts whose first token came now. They took the time since the prompt
        before them was done or, where the engine was free, since the earliest of them was submitted (`submitted_s`).
        """
        since_s = now_s if self._last_s is None else self._last_s
        if prefill_tokens:
            since_s = max(self._last_prefill_s, submitted_s)
            self._last_prefill_s = now_s
        self._last_s = now_s
        step_s = max(now_s - since_s, 0.0)
        if step_s:
            self._speed.note(prefill_tokens, decode_tokens, step_s)
        return step_s
