"""A drop-in for zmq.green: every name of zmq, with the sockets, contexts and pollers that wait cooperatively.

import greensafe as zmq
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import zmq as _zmq

from .context import Context as Context
from .device import device as device, proxy as proxy, proxy_steerable as proxy_steerable
from .poll import Poller as Poller, select as select, zmq_poll as zmq_poll
from .socket import Socket as Socket

if TYPE_CHECKING:
    from zmq import *  # type: ignore[assignment] # noqa: F403
else:
    # What is ours already stays ours.
    globals().update({name: getattr(_zmq, name) for name in _zmq.__all__ if name not in globals()})

__all__ = list(_zmq.__all__)
