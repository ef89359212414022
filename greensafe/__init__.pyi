# What a type checker sees: the names of zmq are collected at run time, which it cannot follow.
from . import green as green, hooks as hooks, journal as journal, stats as stats
from .client import Client as Client
from .deadlines import deadline as deadline, move_on as move_on, shield as shield
from .errors import (
    Cancelled as Cancelled,
    DeadlineExceeded as DeadlineExceeded,
    Disconnected as Disconnected,
    GreensafeError as GreensafeError,
    JournalError as JournalError,
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
)
from .green import *  # noqa: F403
from .server import Server as Server, serve as serve
from .server.request import LATER as LATER, Request as Request
from .server.supervision import stats_of as stats_of, supervise as supervise, supervised as supervised

__version__: str
