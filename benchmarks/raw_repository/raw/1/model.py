"""Sends as many tokens as a request asks for, each in a response of its own: what a backend without frames does.

All requests of the model advance together, as in the steps of an engine; each says how long a step takes.
"""

import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One thread steps over all requests in flight."""

    def initialize(self, args: dict[str, str]) -> None:
        self._new = threading.Condition()
        self._waiting: list[list] = []
        self._stop = False
        self._step_s = 0.0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def execute(self, requests: list) -> None:
        with self._new:
            for request in requests:
                tokens, step_us = pb_utils.get_input_tensor_by_name(request, "tokens_and_step_us").as_numpy().tolist()
                self._waiting.append([request.get_response_sender(), tokens])
                self._step_s = step_us / 1e6
            self._new.notify()

    def finalize(self) -> None:
        with self._new:
            self._stop = True
            self._new.notify()
        self._thread.join()

    def _serve(self) -> None:
        running: list[list] = []
        next_s = 0.0
        while True:
            next_s = max(next_s, time.monotonic()) + self._step_s
            with self._new:
                while not (running or self._waiting or self._stop):
                    self._new.wait()
                if self._stop:
                    return
                running += self._waiting
                self._waiting = []
            for entry in running:
                sender, left = entry
                flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if left == 1 else 0
                token = pb_utils.Tensor("token", np.array([left], np.int32))
                sender.send(pb_utils.InferenceResponse([token]), flags=flags)
                entry[1] -= 1
            running = [entry for entry in running if entry[1]]
            time.sleep(max(next_s - time.monotonic(), 0.0))
