"""Journals, which keep what must survive a server: the interface, the writes, and sqlite as the default."""

from ..sansio.records import Ack, Begin, Effect, Excuse, Failed, Finish, Forget, Known, Rerun, State, Step, Write
from .base import Journal
from .sqlite import SqliteJournal
from .steps import Codec, JsonOrBytes, in_transaction

__all__ = [
    "Ack",
    "Begin",
    "Codec",
    "Effect",
    "Excuse",
    "Failed",
    "Finish",
    "Forget",
    "Journal",
    "JsonOrBytes",
    "Known",
    "Rerun",
    "SqliteJournal",
    "State",
    "Step",
    "Write",
    "in_transaction",
]
