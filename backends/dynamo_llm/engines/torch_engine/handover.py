"""KV blocks that come from another worker, or wait for one: the torch engine's side of `dynamo_llm.transfer`.

A prefill request (`do_remote_decode`) ends with its first token, and its blocks are pinned until a reader has them. A
decode request (`do_remote_prefill`) enters the batch with blocks, like any other, and while those are filled from
elsewhere the batch goes on without it. Its own prefix cache counts: only what follows is read. Whatever goes wrong, it
computes its prompt itself.

Blocks that NIXL may read or write are *held*: nobody's release makes them free before NIXL is done with them.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dynamo_llm.engines.torch_engine.scheduler import Scheduler
from dynamo_llm.engines.torch_engine.sequence import Sequence
from dynamo_llm.transfer import KvTransfer, TransferError

logger = logging.getLogger(__name__)

PULL_TIMEOUT_S = 10.0
"""After this the prompt is computed here."""


class Handover:
    """Engine thread only, but for the callbacks of the transfer: they `post` what is to be done to the engine."""

    def __init__(
        self,
        transfer: KvTransfer,
        scheduler: Scheduler,
        post: Callable[[Callable[[], None]], None],
        lease_s: float,
    ) -> None:
        self.transfer = transfer
        self._scheduler, self._post, self._lease_s = scheduler, post, lease_s
        self._pulling: dict[int, Sequence] = {}

    def pin(self, sequence: Sequence) -> dict[str, Any] | None:
        """Keep its prompt's blocks for a reader; the parameters by which it finds them. None: it must do without."""
        blocks = sequence.blocks[: -(-sequence.computed // self._scheduler.blocks.block_size)]
        try:
            params = self.transfer.exporter.pin(str(sequence.key), blocks, self._lease_s)
        except TransferError as error:
            logger.warning("the blocks of a prefill are not handed over: %s", error)
            return None
        self._scheduler.blocks.hold(blocks)
        return {**params, "first_token_counts": True}

    def unpin(self, key: int) -> None:
        """Nobody will read the blocks of that prefill."""
        self.transfer.exporter.release(str(key))

    def begin(self) -> bool:
        """Start to read for the sequences that have just entered the batch. True: one of them can be computed now."""
        self._drop_preempted()
        ready = False
        for sequence in self._scheduler.running:
            if sequence.remote is not None:
                ready |= not self._start(sequence)
        return ready

    def leave(self, sequence: Sequence) -> None:
        """It has ended, or goes on by itself: stop reading, and tell the writer so."""
        if sequence.pull is not None:
            self._pulling.pop(sequence.key, None)
            self.transfer.puller.cancel(sequence.pull)
        elif sequence.remote is not None:
            with suppress(TransferError):  # broken, or of somebody who is gone: there is nobody to tell
                self.transfer.puller.release(sequence.remote)
        sequence.remote = sequence.pull = None

    def close(self) -> None:
        self.transfer.close()

    def _start(self, sequence: Sequence) -> bool:
        """False: it is computed here after all."""
        size, cached = self._scheduler.blocks.block_size, sequence.computed // self._scheduler.blocks.block_size
        tokens = len(sequence.tokens) - 1  # somebody has to compute the last one for the next one's logits
        wanted = sequence.blocks[cached : -(-tokens // size)]
        if sequence.remote is None or not wanted or sequence.wants_prompt_logprobs:
            self.leave(sequence)
            return False

        began_s = time.monotonic()

        def on_done(error: TransferError | None) -> None:
            took_s = time.monotonic() - began_s
            self._post(lambda: self._done(sequence, tokens, took_s, error))

        def on_settled() -> None:
            self._post(lambda: self._scheduler.blocks.drop(wanted))

        try:
            sequence.pull = self.transfer.puller.start(
                sequence.remote,
                wanted,
                skip=cached,
                timeout_s=PULL_TIMEOUT_S,
                on_done=on_done,
                on_settled=on_settled,
            )
        except TransferError as error:
            logger.info("a prompt is computed here: %s", error)
            sequence.remote = None
            return False
        self._scheduler.blocks.hold(wanted)
        sequence.remote, self._pulling[sequence.key] = None, sequence
        return True

    def _done(self, sequence: Sequence, tokens: int, took_s: float, error: TransferError | None) -> None:
        if self._pulling.get(sequence.key) is not sequence:
            return  # it has left in the meantime
        del self._pulling[sequence.key]
        sequence.pull = None
        if error is None:
            sequence.pulled_tokens, sequence.pull_s = tokens - sequence.computed, took_s
            sequence.computed = tokens
            self._scheduler.blocks.commit(sequence)
            return
        logger.info("a prompt is computed here: %s", error)
        self._scheduler.restart(sequence)  # with other blocks: something may still come into these

    def _drop_preempted(self) -> None:
        """Those that gave their blocks back go on by themselves."""
        for sequence in [s for s in self._pulling.values() if s.row < 0]:
            self.leave(sequence)


def check_params(params: dict[str, Any]) -> bool:
    """Whether they ask for a prefill only, not for what follows one. Raises `ValueError` where it is neither."""
    exports, imports = params.get("do_remote_decode"), params.get("do_remote_prefill")
    if exports is True and not imports:
        return True
    if imports is True and not exports:
        return False
    raise ValueError("kv_transfer_params must have one of do_remote_decode and do_remote_prefill true")
