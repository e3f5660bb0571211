"""Settings of disaggregation that change while the router runs: the registry's, over those it was started with.

`app.py` makes one; `pool.Pool` passes on what its watch sees, and `generation.py` reads `current` for each request.
"""

import logging
from typing import Any

import msgspec

from kvstore.watch import SettingChanged
from router.config import DisaggSettings

logger = logging.getLogger(__name__)


class LiveSettings:
    """See the module's docstring."""

    def __init__(self, defaults: DisaggSettings) -> None:
        self.current = defaults
        self._defaults = defaults

    def on_change(self, change: SettingChanged) -> None:
        """Take a setting over. A value that is no good is told in one line and changes nothing; None brings the default
        back; a name of somebody else's is ignored."""
        if change.name not in DisaggSettings.__struct_fields__:
            return
        value = getattr(self._defaults, change.name) if change.value is None else change.value
        try:
            self.current = _replaced(self.current, change.name, value)
        except msgspec.ValidationError as error:
            logger.warning("setting %s = %.80r is ignored: %s", change.name, value, error)
            return
        logger.info("setting %s is %r now", change.name, value)


def _replaced(settings: DisaggSettings, name: str, value: Any) -> DisaggSettings:
    """Raises `msgspec.ValidationError`."""
    return msgspec.convert({**msgspec.structs.asdict(settings), name: value}, DisaggSettings)
