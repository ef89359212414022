/* rep ENDPOINT: a REP that prints where it is bound, and sends every request back as its reply. */

#include "peer.h"

#define MOST_FRAMES 16

int main (int argc, char **argv)
{
    if (argc != 2)
        return 2;
    alarm (LIFE);
    void *context = zmq_ctx_new ();
    void *rep = zmq_socket (context, ZMQ_REP);
    CHECK (zmq_bind (rep, argv[1]));
    char endpoint[256];
    size_t size = sizeof endpoint;
    CHECK (zmq_getsockopt (rep, ZMQ_LAST_ENDPOINT, endpoint, &size));
    puts (endpoint);
    fflush (stdout);
    for (;;) {
        zmq_msg_t frames[MOST_FRAMES];
        int count = 0;
        do {
            CHECK (zmq_msg_init (&frames[count]));
            CHECK (zmq_msg_recv (&frames[count], rep, 0));
        } while (zmq_msg_more (&frames[count++]) && count < MOST_FRAMES);
        for (int i = 0; i < count; i++)
            CHECK (zmq_msg_send (&frames[i], rep, i + 1 < count ? ZMQ_SNDMORE : 0));
    }
}
