"""Every Redis key, in one place. `docs/redis.md` shows the same table with examples.

Everything lives under one prefix (default `dynamo`). The part in braces is the hash tag of Redis Cluster: keys that
are touched by one script or transaction share it. `NS` is the namespace, `MODEL` the model name, percent-encoded, and
`BS` the block size in tokens.

| key | type | content | goes away |
|---|---|---|---|
| `P:{NS}:instance:ID` | string | msgpack `LeaseRecord`: card and lease length | with the lease (default 10 s) |
| `P:{NS}:instances` | set | ids of all instances with a lease | after `RETENTION_S`; dead ids are pruned by readers |
| `P:{NS}:era` | string | a random word that is lost with the data: readers tell a flush by it | after `RETENTION_S` |
| `P:{NS}:blob:SHA256` | string | what cards refer to (tokenizer, template, config, NIXL data) | after `RETENTION_S` |
| `P:{NS}:settings` | hash | dynamic settings: name -> JSON | kept until deleted; at most 256 of 4 KiB |
| `P:{NS}:changes` | channel | `+ID`, `-ID`, `=NAME`: something changed, list again | not stored |
| `P:{NS/MODEL/BS}:events` | stream | KV events, field `b`: msgpack `EventBatch` | trimmed, and after `RETENTION_S` |
| `P:{NS/MODEL/BS}:index` | hash | newest snapshot of the prefix index: `id`, `data` | after `RETENTION_S` |
| `P:{NS/MODEL/BS}:index-writer` | string | which router writes the snapshot at present | after one interval |
| `P:{NS/MODEL/BS}:prefill-queue` | stream | field `t`: msgpack `Ticket`; group `prefill` | when called or left |
| `P:{NS/MODEL/BS}:prefill-calls:ROUTER` | channel | msgpack `Call` for one router | not stored |

What goes away after `RETENTION_S` is refreshed while anyone uses it: the leases' holders keep `instances`, `era` and
their blobs alive, each heartbeat the stream, each new snapshot the index.
"""

import re
from urllib.parse import quote

from msgspec import Struct

from kvstore.errors import StoreConfigError

RETENTION_S = 3600
"""How long shared keys outlive the last process that uses them."""

_WORD = re.compile(r"[A-Za-z0-9._-]{1,64}")


def is_word(text: str) -> bool:
    """Whether a text may be a prefix, a namespace, an instance id or a setting's name."""
    return _WORD.fullmatch(text) is not None


class Keys(Struct, frozen=True):
    """The names of one namespace's keys. Raises `StoreConfigError` for an unfit prefix or namespace."""

    prefix: str = "dynamo"
    namespace: str = "default"

    def __post_init__(self) -> None:
        for what, text in (("prefix", self.prefix), ("namespace", self.namespace)):
            if not is_word(text):
                raise StoreConfigError(f"{what} {text!r} may hold letters, digits, '.', '_' and '-' only, 64 at most")

    def instances(self) -> str:
        return self._of_namespace("instances")

    def instance(self, instance: str) -> str:
        return self._of_namespace(f"instance:{instance}")

    def era(self) -> str:
        return self._of_namespace("era")

    def blob(self, sha256: str) -> str:
        return self._of_namespace(f"blob:{sha256}")

    def settings(self) -> str:
        return self._of_namespace("settings")

    def changes(self) -> str:
        return self._of_namespace("changes")

    def events(self, model: str, block_size: int) -> str:
        return self._of_model(model, block_size, "events")

    def index(self, model: str, block_size: int) -> str:
        return self._of_model(model, block_size, "index")

    def index_writer(self, model: str, block_size: int) -> str:
        return self._of_model(model, block_size, "index-writer")

    def prefill_queue(self, model: str, block_size: int) -> str:
        return self._of_model(model, block_size, "prefill-queue")

    def prefill_calls(self, model: str, block_size: int, router: str) -> str:
        return self._of_model(model, block_size, f"prefill-calls:{router}")

    def _of_namespace(self, name: str) -> str:
        return f"{self.prefix}:{{{self.namespace}}}:{name}"

    def _of_model(self, model: str, block_size: int, name: str) -> str:
        return f"{self.prefix}:{{{self.namespace}/{quote(model, safe='')}/{block_size}}}:{name}"
