// node req.mjs ENDPOINT: a REQ that sends every line of its input as a request, and prints the reply as a line (as req.c).

import { createInterface } from "node:readline";
import { Request } from "zeromq";

// A peer that nobody ends ends itself.
setTimeout(() => process.exit(1), 120_000).unref();

const req = new Request();
req.connect(process.argv[2]);
for await (const line of createInterface({ input: process.stdin })) {
    await req.send(line.split(",").map((frame) => Buffer.from(frame, "hex")));
    const reply = await req.receive();
    console.log(reply.map((frame) => frame.toString("hex")).join(","));
}
req.close();
