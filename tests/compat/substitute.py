"""A plug-in for pytest that runs pyzmq's tests with another module in the place of zmq.green; see `run.py`, which starts it."""

from __future__ import annotations

import os

if os.environ.get("COMPAT_MONKEY"):
    from gevent import monkey

    monkey.patch_all()

import importlib
import sys
from typing import Any

import pytest
import zmq
import zmq.green

#: These demand a warning that RCVTIMEO and SNDTIMEO have no effect. Here they have one.
DEVIATIONS = ("TestSocketGreen::test_warn_set_timeo", "TestSocketGreen::test_warn_get_timeo")

#: What says nothing about the module, by scope; not run.
UNFIT = {
    ("all", "TestPubLog::test_blank_root_topic"): "a plain test that hangs if its subscriber is late",
    ("forced", "TestPubLog::test_blank_root_topic"): "hangs if its subscriber is late",
    ("forced", "TestContext::test_instance_subclass_first"): "about plain contexts: fails if an earlier test has left one open",
}

SCOPE = os.environ.get("COMPAT_SCOPE", "green")

original = zmq.green
module: Any = importlib.import_module(os.environ["COMPAT_MODULE"])
sys.modules["zmq.green"] = zmq.green = module


def pytest_report_header() -> str:
    return f"{module.__name__} ({module.__file__}) for zmq.green, scope {SCOPE}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SCOPE == "green":
        config.hook.pytest_deselected(items=[item for item in items if not _is_green(item)])
        items[:] = filter(_is_green, items)
    for kind in {getattr(item, "cls", None) for item in items} - {None}:
        if SCOPE == "forced":
            _give_context(kind)
        if SCOPE == "forced" or getattr(kind, "green", False):
            _expect_own_name(kind)
    for item in items:
        for (scope, test), reason in UNFIT.items():
            if scope == SCOPE and item.nodeid.endswith(test):
                item.add_marker(pytest.mark.xfail(run=False, reason=reason))
    if module is not original:
        for item in items:
            if item.nodeid.endswith(DEVIATIONS):
                item.add_marker(pytest.mark.xfail(strict=True, reason="RCVTIMEO and SNDTIMEO have an effect"))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Any:
    """The fixture `Context`, unless a test's own module or class has one."""
    if SCOPE != "forced" or fixturedef.argname != "Context" or not fixturedef.func.__code__.co_filename.endswith("conftest.py"):
        return None
    fixturedef.cached_result = (module.Context, fixturedef.cache_key(request), None)
    return module.Context


def _is_green(item: pytest.Item) -> bool:
    return getattr(getattr(item, "cls", None), "green", False) or "zmq.green" in item.nodeid


def _give_context(kind: Any) -> None:
    """Classes that bring a Context of their own (asyncio, futures) keep it."""
    from zmq_test_utils import BaseZMQTestCase  # type: ignore[import-not-found]

    if issubclass(kind, BaseZMQTestCase) and kind.Context is BaseZMQTestCase.Context:
        kind.Context = module.Context


def _expect_own_name(kind: Any) -> None:
    """Every module's classes are shown by their own name."""
    shown = getattr(kind, "_repr_cls", "")
    for owned in (module.Socket, module.Context):
        if shown.endswith(f".{owned.__name__}"):
            kind._repr_cls = owned.__dict__.get("_repr_cls") or f"{owned.__module__}.{owned.__name__}"
