"""The public model `M`: text or token ids in, text out, in the dialects that Triton's LLM users know.

A host calls `PublicModel.generate` with the tensors of one request: numpy arrays by name, with `object` arrays of bytes
for BYTES. It knows nothing of Triton. The dialects, vllm_backend's and tensorrtllm_backend's, are described in
docs/triton-clients.md; `public/` reads the inputs and makes the outputs.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from typing import Any

from dynamo_llm.public.answer import Progress, trtllm_response, vllm_response
from dynamo_llm.public.request import REQUEST_ID, Model, Prompt, head, understand
from dynamo_llm.public.running import Running
from dynamo_llm.public.sampling import DEFAULT_MAX_TOKENS, Options, explained
from dynamo_llm.public.tensors import Tensors
from dynamo_llm.service import Service, ServiceError
from dynamo_llm.session import Session
from kvstore.text import Tokenizer
from kvstore.wire import Output

__all__ = ["DEFAULT_MAX_TOKENS", "REQUEST_ID", "Options", "PublicModel", "Running", "Tensors"]


class PublicModel:
    """Serves clients of `M` through sessions of their own on a service."""

    def __init__(
        self,
        service: Service,
        tokenizer: Tokenizer | None,
        running: Running | None = None,
        *,
        exclude_input: bool = False,
    ) -> None:
        """Without a tokenizer, only `input_ids` are taken and only `output_ids` given. Models that share `running` stop
        each other's requests. `exclude_input`: see `request.Model`."""
        self._service = service
        self._tokenizer = tokenizer
        self._running = running or Running()
        self._exclude_input = exclude_input

    async def generate(
        self, tensors: Mapping[str, Any], parameters: Mapping[str, Any]
    ) -> AsyncGenerator[Tensors, None]:
        """The answers to one request: one or more per engine step when streaming, else one for each prompt, or, in
        tensorrtllm_backend's dialect, for each sequence. Raises `ServiceError`.

        `parameters` are the request's, with its id under `REQUEST_ID` where the host knows it.
        """
        with self._service.counting_refusals():
            name, stop = head(tensors, parameters)
        if stop:
            self._running.stop(name)
            yield {}
            return
        with self._running.under(name) as ticket:
            with self._service.counting_refusals():
                model = Model(self._service.engine.info, self._tokenizer, self._exclude_input)
                prompts = await understand(tensors, parameters, model)
                session = self._service.local_session()
            try:
                sequences = self._submit(session, prompts)
                ticket.on_stop(partial(self._cancel, session, range(len(sequences))))
                while any(sequence.finish_reason is None for sequence in sequences):
                    self._take(session, sequences, await _outputs(session))
                    for response in _responses(prompts, sequences):
                        yield response
            finally:
                self._service.end_session(session, "closed")

    def _submit(self, session: Session, prompts: Sequence[Prompt]) -> list[Progress]:
        """All sequences of all prompts; a sequence's place in the list is its rid."""
        sequences: list[Progress] = []
        with self._service.counting_refusals():
            for prompt in prompts:
                for index in range(prompt.options.n):
                    try:
                        self._service.submit(session, prompt.submit(len(sequences), index))
                    except ServiceError as error:
                        message = explained(error.error.message, prompt.sampling)
                        raise ServiceError(error.error.code, message) from None
                    sequences.append(Progress(prompt, index, self._tokenizer))
        return sequences

    def _take(self, session: Session, sequences: Sequence[Progress], outputs: Sequence[Output]) -> None:
        for output in outputs:
            if sequences[output.rid].take(output):
                self._service.cancel(session, output.rid)

    def _cancel(self, session: Session, rids: range) -> None:
        for rid in rids:
            self._service.cancel(session, rid)


def _responses(prompts: Sequence[Prompt], sequences: Sequence[Progress]) -> list[Tensors]:
    """What can be sent now."""
    if prompts[0].dialect == "vllm":
        ready = any(s.fresh for s in sequences) and (prompts[0].stream or all(s.finish_reason for s in sequences))
        return [vllm_response(sequences)] if ready else []
    return [
        trtllm_response(sequence)
        for sequence in sequences
        if sequence.fresh and (sequence.prompt.stream or sequence.finish_reason is not None)
    ]


async def _outputs(session: Session) -> list[Output]:
    outputs, reason = await session.take()
    if reason is not None and not outputs:
        raise ServiceError("engine_failure", f"the session ended: {reason}")
    return outputs
