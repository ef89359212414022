/* req ENDPOINT: a REQ that sends every line of its input as a request, and prints the reply as a line.

   A line is a message: its frames in hexadecimal, with commas between them. An empty line is one empty frame. */

#include "peer.h"

#include <string.h>

static unsigned char nibble (char digit)
{
    return digit <= '9' ? digit - '0' : digit - 'a' + 10;
}

static void send_line (void *socket, char *line)
{
    line[strcspn (line, "\n")] = '\0';
    for (char *frame = line, *next; frame; frame = next) {
        next = strchr (frame, ',');
        if (next)
            *next++ = '\0';
        size_t size = strlen (frame) / 2;
        zmq_msg_t msg;
        CHECK (zmq_msg_init_size (&msg, size));
        unsigned char *data = zmq_msg_data (&msg);
        for (size_t i = 0; i < size; i++)
            data[i] = nibble (frame[2 * i]) << 4 | nibble (frame[2 * i + 1]);
        CHECK (zmq_msg_send (&msg, socket, next ? ZMQ_SNDMORE : 0));
    }
}

static void print_message (void *socket)
{
    int more;
    do {
        zmq_msg_t msg;
        CHECK (zmq_msg_init (&msg));
        CHECK (zmq_msg_recv (&msg, socket, 0));
        const unsigned char *data = zmq_msg_data (&msg);
        for (size_t i = 0; i < zmq_msg_size (&msg); i++)
            printf ("%02x", data[i]);
        more = zmq_msg_more (&msg);
        putchar (more ? ',' : '\n');
        CHECK (zmq_msg_close (&msg));
    } while (more);
    fflush (stdout);
}

int main (int argc, char **argv)
{
    if (argc != 2)
        return 2;
    alarm (LIFE);
    void *context = zmq_ctx_new ();
    void *req = zmq_socket (context, ZMQ_REQ);
    CHECK (zmq_connect (req, argv[1]));
    char *line = NULL;
    size_t room = 0;
    while (getline (&line, &room, stdin) >= 0) {
        send_line (req, line);
        print_message (req);
    }
    free (line);
    CHECK (zmq_close (req));
    CHECK (zmq_ctx_term (context));
    return 0;
}
