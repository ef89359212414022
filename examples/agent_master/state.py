"""What the master knows, in its own tables beside the journal of its requests.

Each public function is a step of a request (`greensafe.journal.in_transaction`): what it writes and the note that it is
done are one transaction. So nothing is ever done and not noted, nor noted and not done, nor done twice.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import wraps
from time import time
from typing import Any

from keys import fingerprint, new_secret, proof, public_of, session_key

from greensafe import RemoteError
from greensafe.journal import in_transaction

_TABLES = (
    "CREATE TABLE IF NOT EXISTS master (secret TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS agents (fingerprint TEXT UNIQUE, name TEXT NOT NULL, public TEXT NOT NULL, accepted_by TEXT)",
    "CREATE TABLE IF NOT EXISTS sessions (fingerprint TEXT NOT NULL, nonce TEXT NOT NULL, key BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS history (at REAL NOT NULL, fingerprint TEXT NOT NULL, what TEXT NOT NULL)",
)


def _step(act: Callable[..., Any]) -> Any:
    """A step that finds the tables made."""

    @wraps(act)
    def prepared(db: sqlite3.Connection, *args: Any) -> Any:
        for table in _TABLES:
            db.execute(table)
        return act(db, *args)

    return in_transaction(prepared)


@_step
def exchange(db: sqlite3.Connection, name: str, public: str) -> str:
    """Note who has asked; returns the master's public half."""
    agent = fingerprint(public)
    if db.execute("INSERT OR IGNORE INTO agents VALUES (?, ?, ?, NULL)", (agent, name, public)).rowcount:
        _note(db, agent, "asked")
    return public_of(_secret(db))


@_step
def is_accepted(db: sqlite3.Connection, agent: str) -> bool:
    """Whether an operator has accepted it."""
    return _find(db, agent, "accepted_by") is not None


@_step
def accept(db: sqlite3.Connection, agent: str, by: str) -> str:
    """Note that an operator accepts an agent; returns its name."""
    if _find(db, agent, "accepted_by") is None:
        db.execute("UPDATE agents SET accepted_by = ? WHERE fingerprint = ?", (by, agent))
        _note(db, agent, "accepted")
    return str(_find(db, agent, "name"))


@_step
def open_session(db: sqlite3.Connection, agent: str, nonce: str) -> str:
    """Note a session with its key; returns the proof that the master has that."""
    key = session_key(_secret(db), _find(db, agent, "public"), nonce)
    db.execute("INSERT INTO sessions VALUES (?, ?, ?)", (agent, nonce, key))
    _note(db, agent, "session")
    return proof(key)


@_step
def listing(db: sqlite3.Connection) -> list[list[str]]:
    """Fingerprint, name and state of each agent."""
    return db.execute(
        "SELECT fingerprint, name, iif(accepted_by IS NULL, 'waits', 'accepted') FROM agents ORDER BY 2, 1"
    ).fetchall()


def _secret(db: sqlite3.Connection) -> int:
    """The master's own, made when it is first needed."""
    row = db.execute("SELECT secret FROM master").fetchone()
    if row is None:
        row = (f"{new_secret():x}",)
        db.execute("INSERT INTO master VALUES (?)", row)
    return int(row[0], 16)


def _find(db: sqlite3.Connection, agent: str, column: str) -> Any:
    row = db.execute(f"SELECT {column} FROM agents WHERE fingerprint = ?", (agent,)).fetchone()
    if row is None:
        raise RemoteError("NOT_FOUND", f"no agent with the fingerprint {agent!r} has asked")
    return row[0]


def _note(db: sqlite3.Connection, agent: str, what: str) -> None:
    db.execute("INSERT INTO history VALUES (?, ?, ?)", (time(), agent, what))
