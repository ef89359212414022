# What a type checker sees: the names of zmq are collected at run time, which it cannot follow.
from .context import Context as Context
from .device import device as device, proxy as proxy, proxy_steerable as proxy_steerable
from .events import ConnectionEvent as ConnectionEvent
from .poll import Poller as Poller, select as select, zmq_poll as zmq_poll
from .socket import Socket as Socket

from zmq import *  # type: ignore[assignment] # noqa: F403 # isort: skip - what is ours already stays ours
