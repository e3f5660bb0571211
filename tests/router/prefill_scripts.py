"""What scripted prefill and decode workers do, in the three ways in which engines hand over."""

from typing import Any

from scripted_worker import Script, ScriptedWorker, ids_of, says

from kvstore import wire

TEXT = "the quick brown fox jumps over the lazy dog"
PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "5e1f",
    "remote_block_ids": [[7, 8, 9]],
    "remote_host": "192.0.2.7",
    "remote_port": 5600,
    "tp_size": 1,
    "opaque": {"none": None, "bytes": b"\x00\xff", "float": 0.1},
}


def hands_over(finish: wire.FinishReason = "length", **more: Any) -> Script:
    """At the end, with the first token of `TEXT`: as vLLM. `more` goes into what is handed over."""

    def script(worker: ScriptedWorker, submit: wire.Submit) -> None:
        finish_prefill(worker, submit, finish, {**PARAMS, **more})

    return script


def finish_prefill(
    worker: ScriptedWorker, submit: wire.Submit, finish: wire.FinishReason = "length", params: Any = None
) -> None:
    """The last output of a prefill."""
    worker.emit(
        wire.Output(
            submit.rid,
            ids_of(TEXT)[:1],
            finish,
            started=worker.started(submit),
            kv_transfer_params=params,
        )
    )


def hands_over_early(worker: ScriptedWorker, submit: wire.Submit) -> None:
    """Before the end and without a token, as SGLang: the test finishes it."""
    worker.emit(wire.Output(submit.rid, [], kv_transfer_params=PARAMS))


def cannot_pull(worker: ScriptedWorker, submit: wire.Submit) -> None:
    """A decode worker on which every pull fails, and which serves plain requests."""
    if submit.kv_transfer_params is None:
        says(TEXT)(worker, submit)
        return
    error = wire.WireError("engine_failure", "the KV blocks could not be read")
    worker.emit(wire.Output(submit.rid, [], "error", error=error))


def takes_no_params(worker: ScriptedWorker, submit: wire.Submit) -> None:
    """A decode worker that refuses what was handed over, and serves plain requests."""
    if submit.kv_transfer_params is None:
        says(TEXT)(worker, submit)
        return
    error = wire.WireError("invalid_request", "the layouts differ")
    worker.emit(wire.Output(submit.rid, [], "error", error=error))
