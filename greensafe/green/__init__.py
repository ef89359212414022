"""A drop-in for zmq.green: every name of zmq, with the sockets, contexts and pollers that wait cooperatively.

import greensafe as zmq
"""

from __future__ import annotations

import zmq as _zmq

from .context import Context as Context
from .device import device as device, proxy as proxy, proxy_steerable as proxy_steerable
from .events import ConnectionEvent as ConnectionEvent
from .poll import Poller as Poller, select as select, zmq_poll as zmq_poll
from .socket import Socket as Socket

# What is ours already stays ours. (Type checkers read __init__.pyi, as they cannot follow this.)
globals().update({name: getattr(_zmq, name) for name in _zmq.__all__ if name not in globals()})

__all__ = [*_zmq.__all__, "ConnectionEvent"]
