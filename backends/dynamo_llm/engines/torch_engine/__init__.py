"""The built-in engine, public name `torch`: paged KV blocks, continuous batching and prefix caching on PyTorch.

`engine.TorchEngine` owns the thread; one step is schedule, run, sample, finish:

    scheduler.py  which tokens to compute (pure)       model_config.py, weights.py  what is read from the model's folder
    blocks.py     which KV blocks hold them (pure)     model.py, rope.py            the network
    sampling.py   which token comes next               operators.py, native.py      what lies between the products

`docs/engine-torch.md` says how they work together.
"""
