"""How fast the engine is, as moving averages over its steps. Pure: durations are passed in."""

_WEIGHT = 0.1
"""Of the newest step."""


class Speed:
    """0 means: not known yet."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_ms = 0.0
        """Of steps that only decode."""

    def note(self, prefill_tokens: int, decode_tokens: int, step_s: float, steps: int = 1) -> None:
        """A step is over, or `steps` equal ones. In a mixed one, what a decode step usually takes is not prefill's."""
        if prefill_tokens:
            decode_s = self.decode_step_ms / 1e3 if decode_tokens else 0.0
            prefill_s = max(step_s - decode_s, step_s * prefill_tokens / (prefill_tokens + decode_tokens))
            rate = prefill_tokens / max(prefill_s, 1e-9)
            self.prefill_tokens_per_s = _average(self.prefill_tokens_per_s, rate, steps)
        elif decode_tokens:
            self.decode_step_ms = _average(self.decode_step_ms, step_s * 1e3, steps)


def _average(before: float, value: float, times: int) -> float:
    return value if not before else value + (before - value) * (1.0 - _WEIGHT) ** times
