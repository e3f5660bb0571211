"""`model.py` of a public model in a PyTriton server's repository, where it stands in front of PyTriton's own file.

PyTriton hands on the tensors and parameters of a request, but not its id, by which clients of tensorrtllm_backend stop
it. `hosts/pytriton.py` puts it there; it runs in Triton's python stub, as a module of the model's folder.
"""

from typing import Any

from . import pytriton_model  # type: ignore[attr-defined]

_REQUEST_ID = "triton_request_id"  # dynamo_llm.public.request.REQUEST_ID: nothing of ours is imported here


class _RequestsServer(pytriton_model.TritonRequestsServer):  # type: ignore[misc]
    def _wrap_request(self, triton_request: Any, *args: Any) -> Any:
        request = super()._wrap_request(triton_request, *args)
        request.parameters[_REQUEST_ID] = triton_request.request_id()
        return request


pytriton_model.TritonRequestsServer = _RequestsServer
TritonPythonModel = pytriton_model.TritonPythonModel
