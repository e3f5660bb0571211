"""An engine without a model, public name `mock`: a vLLM-like scheduler, in real time or simulated.

    timing.py      how long a step takes (pure)           words.py    the tokens it gives, real words of the tokeniser
    blocks.py      KV blocks by their hashes (pure)       request.py  an `EngineRequest` becomes a `MockSequence`
    scheduler.py   what the next step computes (pure)     engine.py   `MockEngine`: the scheduler in real time
    simulation.py  the scheduler in simulated time (pure) trace.py    requests of a trace, by block hashes

`docs/engine-mock.md` says what it imitates, and how well.
"""
