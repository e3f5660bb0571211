"""What vLLM's scheduler says of each step, as load figures. Pure. `engine.py` feeds it on the loop's thread."""

from vllm.v1.metrics.stats import SchedulerStats

from dynamo_llm.engines.async_speed import Pace


class Figures(Pace):
    """Speed from the steps themselves: how many tokens of which kind, and how long it took, as the engine core saw it.

    Without those details (vLLM's own logging of statistics switches them off) it falls back to what `Pace` can tell.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prefill_done = 0
        """Prompt tokens computed of prompts that have had no first token yet."""
        self._exact = False
        self._step_s = 0.0

    def step(self, stats: SchedulerStats) -> None:
        """One step of the scheduler."""
        details = stats.iteration_details
        if details is None or details.is_dummy:
            return
        self._exact = True
        step_s = details.elapsed_ms / 1e3
        self._step_s += step_s
        self.prefill_done += details.num_ctx_tokens
        if step_s > 0:
            self._speed.note(details.num_ctx_tokens, details.num_generation_tokens, step_s)

    def first_token(self, computed_tokens: int) -> None:
        """A prompt is done: its tokens wait no longer."""
        self.prefill_done = max(self.prefill_done - computed_tokens, 0)

    def turn(self, now_s: float, prefill_tokens: int, decode_tokens: int, submitted_s: float) -> float:
        if not self._exact:
            return super().turn(now_s, prefill_tokens, decode_tokens, submitted_s)
        step_s, self._step_s = self._step_s, 0.0
        return step_s
