"""A patch that makes programs and libraries with a plain `import zmq` cooperative.

    import gevent.monkey; gevent.monkey.patch_all()
    import greensafe.monkey; greensafe.monkey.patch_zmq()

Rules:

* The names in NAMES are replaced wherever a module holds the original: in zmq and zmq.sugar, and in every other module that
  imported them earlier (`from zmq import Context`). A name that greensafe.green has nothing of its own for stays as it is.
* zmq.Context, Socket and Poller become subclasses of greensafe's (stand-ins). Whatever was an instance or a subclass of the
  original is one of the stand-in too, so `isinstance(sock, zmq.Socket)` holds for sockets made before, after, and elsewhere.
* The originals themselves are not touched: what waits in threads or event loops of its own (PLAIN: zmq.asyncio, zmq.green,
  pyzmq's garbage collector), and greensafe, go on with them. They look names up in `zmq` at run time, so they get a view
  of zmq in which nothing is replaced.
* zmq.asyncio and zmq.green derive from the originals when they are imported, so `patch_zmq` imports them before it replaces
  anything (16 ms, as that imports asyncio and ssl; gevent.monkey.patch_all comes first, as always). zmq.eventloop is imported
  if tornado is there already; imported later it is not supported.
* zmq.Context.instance() and greensafe.Context.instance() are one context: inproc endpoints of both meet.
* What was made before and cannot be replaced goes on blocking the hub; one warning names it.

It does not know originals kept anywhere but in the globals of modules: class attributes, default arguments, closures,
containers (those of zmq.devices and zmq.decorators are known). `zmq.devices.monitored_queue` stays blocking.
"""

from __future__ import annotations

import abc
import gc
import importlib
import os
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import zmq
import zmq.sugar.poll
from gevent.monkey import MonkeyPatchWarning

from . import green
from .transport.pump import Pump

__all__ = ["get_original", "is_patched", "patch_zmq", "unpatch_zmq"]

#: What is replaced, as far as greensafe.green has its own.
NAMES: Final = ("Context", "Socket", "Poller", "select", "zmq_poll", "proxy", "proxy_steerable", "device")

#: Modules, with what is below them, that go on with the originals.
PLAIN: Final = ("greensafe", "zmq._future", "zmq.asyncio", "zmq.backend", "zmq.eventloop", "zmq.green", "zmq.utils.garbage")

_ORIGINALS: Final[dict[str, Any]] = {name: getattr(zmq, name) for name in NAMES}
_KINDS: Final = (_ORIGINALS["Context"], _ORIGINALS["Socket"], _ORIGINALS["Poller"])

#: What was replaced, in order: owner, name, old value, new value.
_changes: list[tuple[Any, str, Any, Any]] = []


class _StandIn(abc.ABCMeta):
    """The type of a class that takes the place of another one; ABCMeta, so that it can be mixed with abstract classes.

    Attributes:
        _stands_for: The class whose place is taken. What is derived from a stand-in stands for nothing but itself.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        original = vars(cls).get("_stands_for")
        return super().__instancecheck__(instance) if original is None else isinstance(instance, original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        original = vars(cls).get("_stands_for")
        return super().__subclasscheck__(subclass) if original is None else issubclass(subclass, original)


class Socket(green.Socket, metaclass=_StandIn):
    """The stand-in for zmq.Socket while patched."""

    _stands_for = _ORIGINALS["Socket"]
    __class_getitem__: Any = classmethod(types.GenericAlias)  # zmq.Socket[bytes] is evaluated by some programs


class Context(green.Context, metaclass=_StandIn):
    """The stand-in for zmq.Context while patched."""

    _stands_for = _ORIGINALS["Context"]
    _socket_class = Socket
    __class_getitem__: Any = classmethod(types.GenericAlias)

    @classmethod
    def instance(cls, io_threads: int = 1) -> Any:
        """Return the process's global context, the same that greensafe.Context.instance() returns."""
        if cls is not Context:
            return super().instance(io_threads)
        shared = green.Context
        with cls._instance_lock:
            if shared._instance is None or shared._instance_pid != os.getpid() or shared._instance.closed:
                shared._instance = cls(io_threads)
                shared._instance_pid = os.getpid()
        return shared._instance


class Poller(green.Poller, metaclass=_StandIn):
    """The stand-in for zmq.Poller while patched."""

    _stands_for = _ORIGINALS["Poller"]


class _PlainZmq(types.ModuleType):
    """The module `zmq` as the modules in PLAIN see it while patched: the originals, and everything else as it is."""

    def __init__(self) -> None:
        super().__init__("zmq", zmq.__doc__)
        vars(self).update(_ORIGINALS)

    def __getattr__(self, name: str) -> Any:
        return getattr(zmq, name)


def patch_zmq() -> None:
    """Make zmq cooperative for every module that imports it, or has imported it. A second call does nothing.

    Call it after gevent.monkey.patch_all() and before the program makes contexts or derives from zmq's classes. Warns
    once (gevent.monkey.MonkeyPatchWarning) about what it comes too late for: classes derived from zmq.Context, zmq.Socket and
    zmq.Poller, their living instances, and Context.instance().
    """
    if _changes:
        return
    _import_what_stays_plain()
    too_late = _too_late()
    new = {id(_ORIGINALS[name]): value for name, value in _replacements().items()}
    view = {id(zmq): _PlainZmq()}
    for name, module in _modules():
        if not _is_in(PLAIN, name):
            _replace(module, new)
        elif not _is_in((__name__, "zmq.backend"), name):
            _replace(module, view)
    for owner in _owners_in_pyzmq():
        _replace(owner, new)
    if too_late:
        warnings.warn(
            "patch_zmq() comes too late for what was made from zmq before and still blocks every greenlet: "
            f"{'; '.join(too_late)}. Call it earlier, before the modules that make these are imported.",
            MonkeyPatchWarning,
            stacklevel=2,
        )


def unpatch_zmq() -> None:
    """Put back all that `patch_zmq` replaced, for tests. Contexts, sockets and subclasses made meanwhile stay green.

    Modules that were first imported meanwhile get the original classes too, and those of pyzmq the functions as well.
    """
    if not _changes:
        return
    while _changes:
        owner, name, old, new = _changes.pop()
        if vars(owner).get(name) is new:
            setattr(owner, name, old)
    back = {id(new): _ORIGINALS[name] for name, new in _replacements().items()}
    classes = {key: old for key, old in back.items() if old in _KINDS}
    for name, module in _modules():
        if not _is_in(("greensafe",), name):
            _replace(module, back if _is_in(("zmq",), name) else classes)
    for owner in _owners_in_pyzmq():
        _replace(owner, back)
    _changes.clear()


def is_patched() -> bool:
    """Return whether `patch_zmq` is in force."""
    return bool(_changes)


def get_original(name: str) -> Any:
    """Return the blocking Context, Socket, ... that pyzmq has under this name, patched or not."""
    return _ORIGINALS[name]


def _replacements() -> dict[str, Any]:
    """Return what replaces each name: the stand-ins, and the functions that greensafe.green has at this time."""
    found: dict[str, Any] = {"Context": Context, "Socket": Socket, "Poller": Poller}
    for name in NAMES:
        value = vars(green).get(name)
        if name not in found and value is not None and value is not _ORIGINALS[name]:
            found[name] = value
    return found


def _import_what_stays_plain() -> None:
    names = ["zmq.asyncio", "zmq.green", "zmq.utils.garbage"]
    if "tornado" in sys.modules:
        names += ["zmq.eventloop.future", "zmq.eventloop.zmqstream"]
    for name in names:
        importlib.import_module(name)


def _is_in(packages: tuple[str, ...], name: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _modules() -> Iterator[tuple[str, Any]]:
    """Yield what is in sys.modules and has a namespace. Some programs put other things there than modules."""
    for name, module in list(sys.modules.items()):
        if isinstance(getattr(module, "__dict__", None), dict):
            yield name, module


def _owners_in_pyzmq() -> Iterator[Any]:
    """Yield the places in pyzmq's own modules, besides their globals, that keep a context class."""
    devices = sys.modules.get("zmq.devices.basedevice")
    if devices is not None:
        yield devices.Device
        yield devices.ProcessDevice
    decorators = sys.modules.get("zmq.decorators")
    if decorators is not None:
        yield from (each for each in gc.get_objects() if type(each) is decorators._ContextDecorator)


def _replace(owner: Any, new: dict[int, Any]) -> None:
    """Replace the values in a namespace that are, by identity, keys of `new`, and methods bound to such a class."""
    for name, old in list(vars(owner).items()):
        if owner is zmq.sugar.poll and name == "zmq_poll":
            continue  # what the original Poller polls with
        value = new.get(id(old))
        if value is None and type(old) is types.MethodType and id(old.__self__) in new:
            value = getattr(new[id(old.__self__)], old.__name__)
        if value is not None:
            setattr(owner, name, value)
            _changes.append((owner, name, old, value))


def _too_late() -> list[str]:
    """Describe what other code has already made from the originals, but for the code that stays plain."""
    found = []
    classes = {each for kind in _KINDS for each in _descendants(kind) if _is_blocking(each)}
    if classes:
        found.append("the classes " + ", ".join(sorted(map(_name, classes))))
    if instances := Counter(_name(type(each)) for each in _instances()):
        found.append("the objects " + ", ".join(f"{count} x {name}" for name, count in sorted(instances.items())))
    shared = _ORIGINALS["Context"]._instance
    if shared is not None and not shared.closed:
        found.append("Context.instance(), which from now on is another context")
    return found


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _descendants(cls: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(cls)
    for child in children:
        yield child
        yield from _descendants(child)


def _is_blocking(cls: type) -> bool:
    """Return whether a class is one of the originals or derived from one without anything of PLAIN in between."""
    if not issubclass(cls, _KINDS):
        return False
    return not any(_is_in(PLAIN, base.__module__) for base in cls.__mro__ if base not in _KINDS and issubclass(base, _KINDS))


def _instances() -> Iterator[Any]:
    """Living contexts, sockets and pollers that block, without those that nobody waits on: pyzmq's own, and our pumps'."""
    objects = gc.get_objects()
    hidden = {id(each.sock) for each in objects if type(each) is Pump}
    collector = sys.modules["zmq.utils.garbage"].gc._context
    if collector is not None:
        hidden.update(map(id, (collector, *collector._sockets)))
    for each in objects:
        if _is_blocking(type(each)) and id(each) not in hidden and not _is_over(each):
            yield each


def _is_over(each: Any) -> bool:
    """Return whether nobody waits on it any more, or does so through another object."""
    return not isinstance(each, _ORIGINALS["Poller"]) and (each.closed or each._shadow)
