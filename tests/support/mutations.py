"""Damage to bytes, as disks, wires and the malicious do it. The same seed does the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

# Lengths that formats hold, made enormous: of msgpack, pickle, safetensors and struct fields.
_HUGE = (
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\xff" * 7 + b"\x7f",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
)
_HUGE += (b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\x80" * 4, b"\0\0\0\x80", b"999999999999999", b"1e308")


def mutated(samples: Sequence[bytes], seed: int) -> bytes:
    """Return one of some samples, damaged in one to four places."""
    chance = random.Random(seed)
    data = bytearray(chance.choice(samples))
    for _ in range(chance.randint(1, 4)):
        chance.choice(_DAMAGES)(data, chance, samples)
    return bytes(data)


def _place(data: bytearray, chance: random.Random) -> int:
    return chance.randrange(len(data)) if data else 0


def _flip(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if data:
        data[_place(data, chance)] ^= 1 << chance.randrange(8)


def _replace(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    at = _place(data, chance)
    data[at : at + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))


def _cut(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    del data[_place(data, chance) :]


def _remove(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    at = _place(data, chance)
    del data[at : at + chance.randint(1, 64)]


def _repeat(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    at = _place(data, chance)
    data[at:at] = data[at : at + chance.randint(1, 32)] * chance.randint(1, 40)


def _splice(data: bytearray, chance: random.Random, samples: Sequence[bytes]) -> None:
    other = chance.choice(samples)
    if other:
        data[_place(data, chance) :] = other[chance.randrange(len(other)) :]


def _huge(data: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    at, value = _place(data, chance), chance.choice(_HUGE)
    data[at : at + chance.choice((0, len(value)))] = value


_DAMAGES = (_flip, _flip, _replace, _cut, _remove, _repeat, _splice, _huge, _huge)
