"""Plain ZeroMQ sockets below every greenlet: reading and sending in the hub, endpoints, names and listening sockets."""
