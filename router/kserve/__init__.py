"""KServe v2 as Triton speaks it, over HTTP (`http.py`) and gRPC (`grpc.py`): the router's other face beside OpenAI's.

`face.py` says which inputs and outputs a model has, `tensors.py` turns their bytes into values and back, `request.py`
makes generation requests of them, `response.py` and `outbox.py` make the answers.
"""
