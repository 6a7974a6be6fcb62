"""The server of the service's own tests."""

from tests.service.conftest import served

__all__ = ["served"]
