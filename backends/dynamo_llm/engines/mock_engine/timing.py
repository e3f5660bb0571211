"""How long one step of the mock engine takes. Pure; the scheduler calls it.

A step lasts a polynomial of the prompt tokens that it computes, if any, plus a polynomial of the share of KV blocks in
use if anything decodes. The defaults are those of the mock engine of Dynamo 1.6.1: a large model on one large GPU.
"""

from msgspec import Struct


class Timing(Struct, frozen=True, kw_only=True):
    """Coefficients in milliseconds: constant, linear, quadratic."""

    prefill: tuple[float, float, float] = (16.50142, 1.518344e-2, 4.209989e-7)
    """Of the prompt tokens in the step, all sequences together."""
    decode: tuple[float, float, float] = (5.74, 54.01, -25.74)
    """Of the share of KV blocks that running sequences hold, 0 to 1. How many sequences decode does not matter."""

    def prefill_ms(self, tokens: int) -> float:
        """0 for no tokens."""
        if not tokens:
            return 0.0
        return _polynomial(self.prefill, tokens)

    def decode_ms(self, share: float) -> float:
        return _polynomial(self.decode, share)


def _polynomial(coefficients: tuple[float, float, float], x: float) -> float:
    """No step takes less than no time, whatever the coefficients."""
    constant, linear, quadratic = coefficients
    return max(constant + (linear + quadratic * x) * x, 0.0)
