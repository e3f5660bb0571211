"""A request's sink for tests: keeps everything that it is told."""

from kvstore import wire


class Inbox:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.outputs: list[wire.Output] = []
        self.refused: list[wire.WireError] = []
        self.lost: list[str] = []
        self.failed: list[str] = []

    def on_output(self, output: wire.Output) -> None:
        self.outputs.append(output)

    def on_refused(self, error: wire.WireError) -> None:
        self.refused.append(error)

    def on_lost(self, reason: str) -> None:
        self.lost.append(reason)

    def on_failed(self, reason: str) -> None:
        self.failed.append(reason)

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def endings(self) -> list[str]:
        """Finish reason, error code or loss; of one request there must be one in the end."""
        reasons = [output.finish_reason for output in self.outputs if output.finish_reason is not None]
        return [*reasons, *(error.code for error in self.refused), *self.lost, *self.failed]
