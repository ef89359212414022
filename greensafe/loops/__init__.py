"""The care for loops: restarts of the library's own, the watch over the hub, the interruption of a greenlet that blocks it."""
