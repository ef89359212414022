"""The base of all packages: timers, turns, threads and forks of gevent's hub, and log lines that cannot flood."""
