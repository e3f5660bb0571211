"""A `dynamo-llm` command that serves, as a user starts it."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[dict[str, str]]:
    """The fields of its ready line, and its first word as `first`. It must end with 0 on SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamo_llm", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:1] == ["ready"]
        yield dict(word.split("=", 1) for word in words if "=" in word) | {"first": words[1]}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
