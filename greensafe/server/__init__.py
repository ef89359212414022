"""The server: a greenlet for each request, under a watchdog that answers for it; or the same over a socket you own."""

from __future__ import annotations

from .server import Server as Server, serve as serve

__all__ = ["Server", "serve"]
