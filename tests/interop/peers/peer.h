/* What both peers in C share. */

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <zmq.h>

/* A peer that nobody ends ends itself, after so many seconds. */
#define LIFE 120

#define CHECK(call) \
    do { \
        if ((call) < 0) { \
            fprintf (stderr, "%s: %s\n", #call, zmq_strerror (zmq_errno ())); \
            exit (1); \
        } \
    } while (0)
