"""TensorRT-LLM behind the interface of all engines. `docs/engine-trtllm.md` says what maps to what.

vendor.py    what we import of TensorRT-LLM, and the only file that does
engine.py    the adapter: start, generate, watch, end
options.py   `engine_options` to the arguments of TensorRT-LLM's `LLM`
sampling.py  requests to TensorRT-LLM's sampling parameters
outputs.py   TensorRT-LLM's results to ours
handover.py  a context from one engine to another, in `kv_transfer_params`
events.py    the KV events that are fetched from TensorRT-LLM to ours (pure)
roots.py     which LoRA adapter and salt a block belongs to, as TensorRT-LLM's events do not say it (pure)
"""
