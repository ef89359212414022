"""Benchmarks that compare within one run: greensafe, zmq.green and plain pyzmq in turn, several rounds, as ratios."""
