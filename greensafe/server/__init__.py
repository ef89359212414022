"""The server: each request in a greenlet of its own, under a watchdog that answers for it; or the same over a socket you own."""

from __future__ import annotations

from .server import Server as Server, serve as serve

__all__ = ["Server", "serve"]
