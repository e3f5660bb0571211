"""An engine in a process and an environment of its own. `engines.create_engine` comes here when a `python` is named.

    engine.py       the worker's side: an `Engine` that passes everything on
    child.py        the other side: `PYTHON -m dynamo_llm.engines.isolated.child` makes the real engine and serves it
    messages.py     what they say to each other             channel.py      how it gets there
    interpreter.py  whether PYTHON will do                  process.py      its life, its words, its end

`child.py` and what it imports need msgspec, numpy, xxhash and the engine's own package; nothing of Redis or Triton.
"""
