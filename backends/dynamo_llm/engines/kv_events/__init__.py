"""KV events of engines with block hashes of their own (vLLM, SGLang, TensorRT-LLM), turned into ours.

decode.py     the bytes of a batch, in both shapes that engines send, to typed events (pure)
translate.py  their hashes to ours, and what is resident where (pure)
sequence.py   which batch of a numbered stream is the next, late, missing or of a new engine (pure)
subscribe.py  the ZMQ sockets of vLLM and SGLang around the three
"""

from dynamo_llm.engines.kv_events.decode import (
    BlockRemoved,
    BlocksCleared,
    BlockStored,
    Event,
    KvEventError,
    decode_events,
)
from dynamo_llm.engines.kv_events.subscribe import KvEventSubscriber, reachable
from dynamo_llm.engines.kv_events.translate import Translator

__all__ = [
    "BlockRemoved",
    "BlockStored",
    "BlocksCleared",
    "Event",
    "KvEventError",
    "KvEventSubscriber",
    "Translator",
    "decode_events",
    "reachable",
]
