// node rep.mjs ENDPOINT: a REP that prints where it is bound, and sends every request back as its reply (as rep.c).

import { Reply } from "zeromq";

// A peer that nobody ends ends itself.
setTimeout(() => process.exit(1), 120_000);

const rep = new Reply();
await rep.bind(process.argv[2]);
console.log(rep.lastEndpoint);
for await (const frames of rep) {
    await rep.send(frames);
}
