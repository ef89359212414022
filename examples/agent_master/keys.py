"""The arithmetic that agent and master share. An example: real programs take X25519 or CURVE, which are faster and shorter.

Diffie-Hellman over the 2048-bit group of RFC 3526 with the standard library alone. Whoever listens learns no session key. But
the agent takes the first master that it meets for the right one: against somebody in between it would have to know that one's
fingerprint, as the operator knows the agent's.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

#: RFC 3526, group 14; its generator is 2.
PRIME = int(
    "ffffffffffffffffc90fdaa22168c234c4c6628b80dc1cd129024e088a67cc74020bbea63b139b22514a08798e3404dd"
    "ef9519b3cd3a431b302b0a6df25f14374fe1356d6d51c245e485b576625e7ec6f44c42e9a637ed6b0bff5cb6f406b7ed"
    "ee386bfb5a899fa5ae9f24117c4b1fe649286651ece45b3dc2007cb8a163bf0598da48361c55d39a69163fa8fd24cf5f"
    "83655d23dca3ad961c62f356208552bb9ed529077096966d670c354e4abc9804f1746c08ca18217c32905e462e36ce3b"
    "e39e772c180e86039b2783a2ec07a28fb5c55df06f4c52c9de2bcbf6955817183995497cea956ae515d2261898fa0510"
    "15728e5a8aacaa68ffffffffffffffff",
    16,
)


def new_secret() -> int:
    """A secret exponent of 256 bits."""
    return secrets.randbits(256)


def public_of(secret: int) -> str:
    """What may be shown of a secret, in hex."""
    return f"{pow(2, secret, PRIME):x}"


def is_public(text: object) -> bool:
    """Whether this can be somebody's public half; 0, 1 and -1 would make the common secret known to all."""
    try:
        return isinstance(text, str) and 1 < int(text, 16) < PRIME - 1
    except ValueError:
        return False


def fingerprint(public: str) -> str:
    """What people compare: 128 bits in hex."""
    return hashlib.sha256(public.encode()).hexdigest()[:32]


def session_key(secret: int, public: str, nonce: str) -> bytes:
    """The key that only the owners of the two secrets can make; another one for each nonce."""
    common = pow(int(public, 16), secret, PRIME).to_bytes(256, "big")
    return hmac.digest(common, b"session " + nonce.encode(), "sha256")


def proof(key: bytes) -> str:
    """By this the master shows that it has the session key; the key itself never travels."""
    return hmac.digest(key, b"master", "sha256").hex()


def signature(token: bytes, body: bytes) -> bytes:
    """What the operator, who has the token, puts beside a request."""
    return hmac.digest(token, body, "sha256")
