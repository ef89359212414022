"""Request/reply over ZeroMQ for gevent programs that never gets stuck.

import greensafe as zmq                 # every name of zmq.green, with limits on every wait
from greensafe import deadline, move_on, shield, Server, Client, serve, supervise
"""

from __future__ import annotations

from . import green as green, hooks as hooks, journal as journal, stats as stats
from .client import Client as Client
from .deadlines import deadline as deadline, move_on as move_on, shield as shield
from .errors import (
    Cancelled as Cancelled,
    DeadlineExceeded as DeadlineExceeded,
    Disconnected as Disconnected,
    GreensafeError as GreensafeError,
    JournalError as JournalError,
    JournalUnavailable as JournalUnavailable,
    LocalProtocolError as LocalProtocolError,
    OperationTimeout as OperationTimeout,
    PeerError as PeerError,
    PeerSilent as PeerSilent,
    ProtocolError as ProtocolError,
    Refused as Refused,
    RemoteError as RemoteError,
    RemoteProtocolError as RemoteProtocolError,
    TimedOut as TimedOut,
    Unreachable as Unreachable,
    Unstorable as Unstorable,
)
from .green import *  # noqa: F403
from .green import __all__ as _green_names
from .server import Server as Server, serve as serve
from .server.request import LATER as LATER, Request as Request
from .server.supervision import stats_of as stats_of, supervise as supervise, supervised as supervised

__version__ = "0.1.0"

__all__ = [
    *_green_names,
    "LATER",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Disconnected",
    "GreensafeError",
    "JournalError",
    "JournalUnavailable",
    "LocalProtocolError",
    "OperationTimeout",
    "PeerError",
    "PeerSilent",
    "ProtocolError",
    "Refused",
    "RemoteError",
    "RemoteProtocolError",
    "Request",
    "Server",
    "TimedOut",
    "Unreachable",
    "Unstorable",
    "deadline",
    "green",
    "hooks",
    "journal",
    "move_on",
    "serve",
    "shield",
    "stats",
    "stats_of",
    "supervise",
    "supervised",
]
