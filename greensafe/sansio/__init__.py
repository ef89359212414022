"""The protocol without I/O: no sockets, no clock, no randomness. Time and ids come in, frames and effects go out."""
