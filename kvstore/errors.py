"""The store's errors, as a tree, and nothing else. Every message is one line that can be shown to an operator as it is.

StoreError
├── StoreConfigError   what was asked can never work: a bad URL, a Redis that is too old, a missing package
├── StoreRefused       Redis answered and said no: wrong password, no permission, no such database
├── StoreUnavailable   Redis could not be reached or did not answer; the same call may work later
└── StoreDataError     a value is too large to store, or what is stored under a key is not what belongs there

No message holds a password.
"""


class StoreError(Exception):
    """Base."""


class StoreConfigError(StoreError):
    """Trying again changes nothing; the configuration has to."""


class StoreRefused(StoreError):
    """Redis is there and refused us or the command."""


class StoreUnavailable(StoreError):
    """Redis could not be reached, or did not answer in time."""


class StoreDataError(StoreError):
    """A value over its limit, or a stored one that does not decode."""
