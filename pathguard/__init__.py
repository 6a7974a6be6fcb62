"""Pathguard serves a CNN as a decoupled network: one forward pass gives the label and the evidence against it."""

from pathguard.client import AsyncClient, Client
from pathguard.version import __version__

__all__ = ["AsyncClient", "Client", "__version__"]
