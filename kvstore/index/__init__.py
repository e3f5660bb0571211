"""Prefix indexes (design contract 4): one protocol in `base`, its implementations beside it."""
