"""Where a server keeps what must survive it: the interface, what is written, and sqlite as the default."""

from ..sansio.records import Ack, Begin, Effect, Failed, Finish, Forget, Known, Rerun, State, Step, Write
from .base import Journal

__all__ = ["Ack", "Begin", "Effect", "Failed", "Finish", "Forget", "Journal", "Known", "Rerun", "State", "Step", "Write"]
