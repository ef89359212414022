"""What keeps the library's own loops going: restarts, the watch over the hub, and the interruption of what holds it."""
