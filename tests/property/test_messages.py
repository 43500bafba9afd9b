"""Whatever bytes come, a decoder returns a message or raises BadMessage."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import DECODERS, SAMPLES

from ckptd.protocol.errors import BadMessage, from_report
from ckptd.protocol.messages import Aborted, Fenced, GaveUp, Message, Refused, TaskFailed, decode_attach_version, encode

often = settings(max_examples=150, deadline=None)
FRAMES = [encode(sample) for samples in SAMPLES.values() for sample in samples]


def read_by_all(frame: bytes) -> None:
    for decode in DECODERS:
        with contextlib.suppress(BadMessage):
            message = decode(frame)
            assert isinstance(message, Message)
            assert decode(encode(message)) == message
            if isinstance(message, Aborted | Fenced | GaveUp | Refused | TaskFailed):
                str(from_report(message.error))
    with contextlib.suppress(BadMessage):
        assert isinstance(decode_attach_version(frame), int)


@st.composite
def damaged(draw) -> bytes:
    frame = bytearray(draw(st.sampled_from(FRAMES)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(frame) - 1))
        if draw(st.booleans()):
            frame[at] ^= 1 << draw(st.integers(0, 7))
        else:
            frame[at : at + draw(st.integers(0, 4))] = draw(st.binary(min_size=1, max_size=4))
    return bytes(frame)


@often
@given(st.binary(max_size=80))
def test_random_bytes(frame):
    read_by_all(frame)


@often
@given(damaged())
def test_damaged_frames(frame):
    read_by_all(frame)


@often
@given(st.sampled_from(FRAMES), st.data())
def test_cut_frames(frame, data):
    read_by_all(frame[: data.draw(st.integers(0, len(frame) - 1))])
