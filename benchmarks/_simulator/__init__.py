"""A cluster in simulated time: mock engines, and a router that asks the policies of the real one.

`cluster` owns the clock and the workers, `routing` leads each request through them, `prefill_queue` is where it waits
while all prefill workers are busy, `workload` makes the requests, and `figures` says what became of them. Nothing in it
reads a clock or draws from a random source of its own: equal arguments give equal figures.
"""
