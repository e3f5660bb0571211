"""SGLang behind the interface of all engines. `docs/engine-sglang.md` says what maps to what.

engine.py    the adapter: start, generate, watch, end
options.py   `engine_options` to SGLang's server arguments
sampling.py  requests to SGLang's sampling parameters and arguments
outputs.py   SGLang's chunks to ours
signals.py   the signal by which SGLang says that one of its processes failed
"""
