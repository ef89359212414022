"""What all else stands on: the timers, turns, threads and forks of gevent's hub, and log lines that cannot flood."""
