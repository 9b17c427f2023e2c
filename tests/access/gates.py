"""A gate that admits everything, for tests of what lies behind it."""

from collections.abc import Mapping

from balance_app.access.gate import Gate
from balance_app.access.keys import ANYBODY, Principal
from balance_app.settings import load_settings


class OpenGate(Gate):
    """Asks nobody."""

    def __init__(self) -> None:
        super().__init__(load_settings())

    def admit_known(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Principal:
        """Admit the request."""
        del method, path, headers
        return ANYBODY
