"""All that the adapter takes from TensorRT-LLM. No other file of ours imports it."""

from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm import __version__ as VERSION
from tensorrt_llm.llmapi import DisaggregatedParams, GuidedDecodingParams, LoRARequest, RequestOutput, TorchLlmArgs
from tensorrt_llm.llmapi import RequestError as VendorRequestError

__all__ = [
    "LLM",
    "VERSION",
    "DisaggregatedParams",
    "GuidedDecodingParams",
    "LoRARequest",
    "RequestOutput",
    "SamplingParams",
    "TorchLlmArgs",
    "VendorRequestError",
]
