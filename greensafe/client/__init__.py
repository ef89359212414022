"""The client: any number of greenlets ask servers, and each gets its own answer or an error that says what happened."""

from __future__ import annotations

from .client import HEARTBEAT as HEARTBEAT, Client as Client

__all__ = ["HEARTBEAT", "Client"]
