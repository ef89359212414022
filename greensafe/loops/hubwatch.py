"""A native thread that finds out when the hub is blocked, and by which code.

A greenlet that computes, or waits in a call that gevent does not know, keeps the hub from turning: no other greenlet runs, no
timer fires, so nothing in the hub can say so. A `HubWatch` sees it from a native thread. Rules:

* One thread for each hub and process: it is started for the first server that asks for it and ends with the last. A forked
  child has none until a server is started there.
* The hub beats by a timer, four times within the shortest limit, which keeps no loop alive. The thread only compares.
* Never early: what is counted is the time by which a beat is late, and only while the thread itself got its turns. So a
  process that was stopped, or a machine that is too busy for both, is nobody's fault and ends nobody.
* Told once for each incident, with the stack of what ran in the hub's thread at that moment, and again when the hub turns.
* A thread that fails goes on by itself (`sansio.backoff.Intensity`); if it does so too often, its servers are told.
* The thread waits for nothing that the blocked greenlet may hold: logging has locks, so it is done by a thread of its own.
* When something is overdue for a server that preempts, whoever runs is interrupted, see `preemption`.

It does not know requests, nor why a greenlet takes so long. While C code keeps the interpreter's lock this thread does not run
either: what it missed so is counted afterwards, by the hub. For code that never gives it back there is systemd's watchdog.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import random
import sys
import traceback
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Any, NamedTuple

import gevent
from gevent.hub import Hub
from gevent.monkey import get_original

from ..hub.forks import forbid_in_child
from ..hub.frames import frames_of_threads
from ..sansio.backoff import Intensity
from .preemption import listen, poke, unlisten, unlisten_in_child

__all__ = ["EXIT_CODE", "HubWatch", "Wish", "watch"]

log = logging.getLogger("greensafe.hubwatch")

#: The exit code of a process that has ended itself because its hub was blocked: sysexits.h's EX_SOFTWARE.
EXIT_CODE = 70

#: Beats, and looks for them, within the shortest limit.
BEATS = 4

#: Seconds between two beats, at least.
SHORTEST = 0.005

#: Seconds between two looks of a thread that preempts, at most: a limit that is shorter may be noticed late by as much.
LOOK = 0.02

#: Seconds between two signals to a greenlet that goes on.
POKE = 0.005

#: Seconds that the hub has to deal with what is due before the thread interferes.
MARGIN = 0.001

#: Seconds that the last words of a process may take.
LAST_WORDS = 1.0

_start_thread: Callable[..., int] = get_original("_thread", "start_new_thread")
_make_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")
_get_ident: Callable[[], int] = get_original("_thread", "get_ident")


class Wish(NamedTuple):
    """The limits that one server has asked for.

    Attributes:
        after: Seconds after which a hub that does not turn is reported.
        exit_after: Seconds after which the process is ended. Both are infinity for never.
        soonest: Gives the monotonic time at which the hub has something to do for this server, for one that preempts;
            called in another thread.
        on_blocked: Called in the hub when it turns again after `after` or more, with the seconds by which it was late and the
            stack of what ran; "" if nobody saw it.
        on_failure: Called in the hub when the watch itself has failed, with the error and the seconds after which it goes on;
            None: it has failed too often and is over.
    """

    after: float = math.inf
    exit_after: float = math.inf
    soonest: Callable[[], float] | None = None
    on_blocked: Callable[[float, str], object] | None = None
    on_failure: Callable[[Exception, float | None], object] | None = None


class HubWatch:
    """The thread that watches this thread's hub; see `watch`.

    Attributes:
        blocked: How often the hub did not turn for as long as the shortest `after`.
        late: Seconds by which the last beat was late.
        longest: The most seconds by which one was.
    """

    def __init__(self) -> None:
        self.blocked = 0
        self.late = 0.0
        self.longest = 0.0
        self._intensity = Intensity()
        self._hub: Hub = gevent.get_hub()
        self._thread = _get_ident()
        self._wishes: list[Wish] = []
        self._after = self._exit_after = math.inf
        self._period = 0.0
        self._timer: Any = None
        self._beaten_at = 0.0
        #: The beat after which an incident was told, and what ran then.
        self._told: tuple[float, str] = (0.0, "")
        self._is_over = False
        self._doorbell = _make_lock()
        self._doorbell.acquire()
        forbid_in_child(self)

    def add(self, wish: Wish) -> None:
        """Watch for one more server. A machine that gives no thread is logged, and no error."""
        is_first = not self._wishes
        self._wishes.append(wish)
        if wish.soonest is not None:
            listen()
        self._adjust()
        if is_first:
            try:
                _start_thread(self._run, ())
            except RuntimeError:
                log.warning("no thread can be started: a blocked hub will only be noticed when it turns again")

    def remove(self, wish: Wish) -> None:
        """Watch no more for a server; the thread ends with the last. In a forked child there is nothing to end."""
        if self._is_over:
            return
        self._wishes.remove(wish)
        if wish.soonest is not None:
            unlisten()
        self._adjust()

    def on_fork(self) -> None:
        """In a forked child, which has inherited everything but the thread."""
        self._is_over = True  # the timer, which is in the child's loop as well, ends at its next beat
        _watches.pop(self._hub, None)
        unlisten_in_child()

    def __repr__(self) -> str:
        state = "over" if self._is_over else "watching"
        return f"<HubWatch {state} servers={len(self._wishes)} blocked={self.blocked} longest={self.longest:.3f} s>"

    # In the hub's thread.

    def _adjust(self) -> None:
        """Set the beat for what is wished now."""
        self._stop_timer()
        if not self._wishes:
            self._end()
            return
        self._after = min(wish.after for wish in self._wishes)
        self._exit_after = min(wish.exit_after for wish in self._wishes)
        self._period = max(min(self._after, self._exit_after, 1.0) / BEATS, SHORTEST)
        self._beaten_at = monotonic()
        self._timer = self._hub.loop.timer(self._period, self._period, ref=False)
        self._timer.start(self._beat, update=True)

    def _beat(self) -> None:
        if self._is_over:
            self._stop_timer()
            return
        before, self._beaten_at = self._beaten_at, monotonic()
        self.late = late = max(0.0, self._beaten_at - before - self._period)
        self.longest = max(self.longest, late)
        if late >= self._after:
            self.blocked += 1
            try:
                self._tell(late, self._told[1] if self._told[0] == before else "")
            except BaseException:  # noqa: BLE001 - without its timer the hub would be taken for blocked
                self._hub.handle_error(self, *sys.exc_info())

    def _tell(self, late: float, stack: str) -> None:
        """The hub turns again."""
        unseen = "" if stack else "; nobody saw why: C code kept Python's lock, or the process was stopped"
        log.warning("the hub turns again, after %.3f s%s", late, unseen)
        for wish in list(self._wishes):
            if late >= wish.after and wish.on_blocked is not None:
                wish.on_blocked(late, stack)

    def _on_failure(self, error: Exception, pause: float | None) -> None:
        for wish in list(self._wishes):
            if wish.on_failure is not None:
                wish.on_failure(error, pause)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _end(self) -> None:
        self._is_over = True
        _watches.pop(self._hub, None)
        self._doorbell.release()

    # In the native thread.

    def _run(self) -> None:
        while not self._is_over:
            try:
                self._watch()
            except Exception as error:  # noqa: BLE001 - a thread that has ended finds nothing any more
                if not self._rest(error):
                    return

    def _rest(self, error: Exception) -> bool:
        """Wait before the next try; False if there is none. That must not depend on the hub, which may be blocked."""
        pause = self._intensity.restart(monotonic(), random.random())
        what = (type(error), error, error.__traceback__)
        text = "the watch over the hub has failed" + (": it is given up" if pause is None else f" and goes on in {pause:.3f} s")
        _aside(lambda: log.error("%s", text, exc_info=what))
        if self._hub.loop is not None:
            self._hub.loop.run_callback_threadsafe(self._on_failure, error, pause)
        if pause is None:
            return False
        self._doorbell.acquire(timeout=pause)
        return True

    def _watch(self) -> None:
        beat, stuck, looked_at = self._beaten_at, 0.0, monotonic()
        while not self._is_over:
            pause = self._pause(looked_at)
            self._doorbell.acquire(timeout=pause)
            now = monotonic()
            if beat != self._beaten_at:
                beat, stuck = self._beaten_at, 0.0
            else:
                # What is more than that, this thread did not get its turn either.
                stuck += min(now - looked_at, pause + self._period)
            looked_at = now
            if not self._is_over:
                self._judge(beat, stuck - self._period)

    def _pause(self, now: float) -> float:
        """Seconds until the next look; something overdue is dealt with now."""
        due = min((wish.soonest() for wish in list(self._wishes) if wish.soonest is not None), default=None)
        if due is None:
            return self._period
        left = due + MARGIN - now
        if left <= 0:
            poke(self._thread)
            return POKE
        return min(LOOK, self._period, left)

    def _judge(self, beat: float, late: float) -> None:
        """Act upon a beat that is late by so many seconds, as far as this thread has seen it."""
        if late < min(self._after, self._exit_after):
            return
        frame = frames_of_threads().get(self._thread)
        if frame is None or self._hub.loop is None:
            self._is_over = True  # the hub's thread has ended without stopping its servers
            _watches.pop(self._hub, None)
        elif late >= self._exit_after:
            self._exit(late)
        elif late >= self._after and self._told[0] != beat:
            stack = _stack(frame)
            self._told = (beat, stack)
            text = f"the hub has not turned for {late:.3f} s; what runs:\n{stack}"
            _aside(lambda: log.error("%s", text))

    def _exit(self, late: float) -> None:
        stacks = _all_stacks(self._thread)
        text = f"the hub has not turned for {late:.3f} s: this process ends itself with code {EXIT_CODE}\n{stacks}"
        for say in (lambda: log.critical("%s", text), lambda: os.write(2, text.encode(errors="replace") + b"\n")):
            if _aside(say).acquire(timeout=LAST_WORDS):
                break  # else a blocked thread holds logging's lock, or nothing reads what is written
        os._exit(EXIT_CODE)


_watches: dict[Hub, HubWatch] = {}


def watch(wish: Wish) -> HubWatch:
    """Have this thread's hub watched, until `remove`."""
    hub = gevent.get_hub()
    if hub not in _watches:
        _watches[hub] = HubWatch()
    found = _watches[hub]
    found.add(wish)
    return found


def _end_all() -> None:
    """At the interpreter's exit no hub turns any more, and none is blocked."""
    for found in list(_watches.values()):
        found._is_over = True


atexit.register(_end_all)


def _aside(say: Callable[[], object]) -> Any:
    """Do something in a thread of its own; the lock that is returned is free when it is done."""
    done = _make_lock()
    done.acquire()

    def run() -> None:
        try:
            say()
        finally:
            done.release()

    try:
        _start_thread(run, ())
    except RuntimeError:
        done.release()  # no thread can be had, and this one must not wait: then it is not said
    return done


def _stack(frame: FrameType) -> str:
    return "".join(traceback.format_stack(frame)).rstrip()


def _all_stacks(first: int) -> str:
    frames = frames_of_threads()
    frames.pop(_get_ident(), None)
    order = sorted(frames, key=lambda ident: ident != first)
    return "\n".join(f"{'the hub' if ident == first else 'another'}'s thread:\n{_stack(frames[ident])}" for ident in order)
