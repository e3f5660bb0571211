"""Runs a worker as a process of its own, and looks at what it leaves over."""

import json
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from dynamo_llm import process_tree

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "model_repository/demo")


class Worker:
    """The process, its output, and what to look for when it is gone."""

    def __init__(self, tmp_path: Path, command: list[str], **options: Any) -> None:
        self.mark = f"test-{uuid.uuid4().hex}"
        self.temporary = tmp_path / "tmp"
        self.temporary.mkdir(exist_ok=True)
        if "repository" not in options:  # which has entries with options of their own
            options = {"model_path": MODEL, "engine": "scripted", "engine_options": {"step_s": 0.01}, **options}
        self.process = subprocess.Popen(
            [sys.executable, *command, json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=ROOT / "tests/dynamo_llm",
            env={**os.environ, process_tree.MARK_VARIABLE: self.mark, "TMPDIR": str(self.temporary)},
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=_collect, args=(pipe, lines), daemon=True)
            for pipe, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()
        self.fields: dict[str, str] = {}
        self.descendants: list[int] = []
        self.regions: set[str] = set()

    @property
    def is_ready(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"the worker ended with {self.process.returncode}: {self.err}")
        return any(line.startswith("ready ") for line in self.out)

    def look(self) -> "Worker":
        """Take in the ready line, and what runs and is mapped now."""
        self.fields = dict(field.split("=", 1) for field in self.out[-1].split()[2:])
        self.descendants = [pid for pid in process_tree.members(self.mark) if pid != self.process.pid]
        self.regions = process_tree.shm_regions(self.descendants)
        assert len(self.descendants) >= 4
        assert self.regions
        return self

    @property
    def nothing_left(self) -> bool:
        return (
            not process_tree.members(self.mark)
            and not any(os.path.exists(region) for region in self.regions)
            and not any(self.temporary.iterdir())
        )

    def wait(self) -> int:
        code = self.process.wait(timeout=30.0)
        for reader in self._readers:
            reader.join(timeout=10.0)
        return code

    def clean(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait()
        process_tree.reap(self.mark, self.regions)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def _collect(pipe: Any, lines: list[str]) -> None:
    for line in pipe:
        lines.append(line.rstrip("\n"))  # noqa: PERF401 - one by one, as they come
