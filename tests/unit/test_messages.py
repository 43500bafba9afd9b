"""Every message, there and back; whatever is not one of ours."""

from __future__ import annotations

import msgspec
import pytest
from support.messages import DECODERS, SAMPLES

from ckptd.protocol.errors import BadMessage
from ckptd.protocol.messages import (
    PROTOCOL_VERSION,
    Heartbeat,
    decode_attach_version,
    decode_client_message,
    encode,
)
from ckptd.protocol.wire import Message

msgpack = msgspec.msgpack.encode


def fields_of(message: Message) -> dict[str, object]:
    return msgspec.msgpack.decode(encode(message))


def names(samples):
    return [(decode, sample) for decode, samples in samples.items() for sample in samples]


CASES = names(SAMPLES)
cases = pytest.mark.parametrize(("decode", "sample"), CASES, ids=[type(case[1]).__name__ for case in CASES])


def test_there_is_a_sample_of_every_message():
    assert {type(sample) for _, sample in CASES} == set(Message.__subclasses__())


@cases
def test_a_message_comes_back_as_it_was(decode, sample):
    received = decode(encode(sample))
    assert type(received) is type(sample)
    assert received == sample


@cases
def test_a_message_of_another_conversation_is_refused(decode, sample):
    for other in DECODERS:
        if other is not decode:
            with pytest.raises(BadMessage):
                other(encode(sample))


@cases
def test_an_unknown_field_is_refused(decode, sample):
    with pytest.raises(BadMessage, match="more"):
        decode(msgpack({**fields_of(sample), "more": 1}))


@cases
def test_a_missing_field_is_refused_unless_it_has_a_default(decode, sample):
    for name in sample.__struct_fields__:
        fields = fields_of(sample)
        del fields[name]
        if name in sample.__struct_fields__[len(sample.__struct_fields__) - len(sample.__struct_defaults__) :]:
            assert type(decode(msgpack(fields))) is type(sample)
        else:
            with pytest.raises(BadMessage, match=name):
                decode(msgpack(fields))


@cases
def test_a_field_of_another_type_is_refused(decode, sample):
    for name in sample.__struct_fields__:
        with pytest.raises(BadMessage):
            decode(msgpack({**fields_of(sample), name: {"an": ["odd", "thing"]}}))


@cases
def test_a_message_is_immutable(decode, sample):
    for name in sample.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(sample, name, 1)


GARBAGE = [
    b"",
    b"\xc1",
    b"\x00",
    b"hello",
    b"\x80",
    msgpack([1, 2]),
    msgpack({"type": "no such"}),
    msgpack({"type": 1}),
]
DEEP = b"\x91" * 100_000 + b"\x00"
DEEP_FIELD = b"\x81\xa1x" + DEEP
BAD_TEXT = b"\x81\xa4type\xa2\xff\xfe"


@pytest.mark.parametrize("decode", [*DECODERS, decode_attach_version], ids=lambda decode: decode.__name__)
@pytest.mark.parametrize(
    "frame", [*GARBAGE, DEEP, DEEP_FIELD, BAD_TEXT, encode(Heartbeat())[:-1]], ids=lambda frame: repr(frame[:12])
)
def test_garbage_is_refused(decode, frame):
    with pytest.raises(BadMessage):
        decode(frame)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("attach", "job", ""),
        ("attach", "job", "x" * 4097),
        ("attach", "rank", -1),
        ("attach", "rank", 2**20),
        ("attach", "world_size", 0),
        ("attach", "progress_timeout_s", -1),
        ("sealed", "image_bytes", -4096),
        ("sealed", "control_bytes", 2**63),
        ("open_arena", "slots", 0),
        ("write_task", "threads", 0),
    ],
)
def test_numbers_out_of_bounds_are_refused(kind, field, value):
    [(decode, sample)] = [case for case in CASES if case[1].__struct_config__.tag == kind][:1]
    with pytest.raises(BadMessage, match=field):
        decode(msgpack({**fields_of(sample), field: value}))


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION, PROTOCOL_VERSION + 7])
def test_the_protocol_version_is_read_from_an_attach_of_any_version(version):
    theirs = {"type": "attach", "protocol": version, "cluster": "of tomorrow", "rank": "zero"}
    assert decode_attach_version(msgpack(theirs)) == version


def test_frames_are_decoded_where_they_lie():
    for decode, sample in CASES:
        assert decode(memoryview(bytearray(encode(sample)))) == sample


@pytest.mark.parametrize("sequence", [-1, 1 << 63])
@pytest.mark.parametrize("name", ["Propose", "Sealed", "GaveUp"])
def test_a_save_without_a_usable_number_is_refused(name, sequence):
    [sample] = [each for each in SAMPLES[decode_client_message] if type(each).__name__ == name][:1]
    with pytest.raises(BadMessage, match="sequence"):
        decode_client_message(msgpack({**fields_of(sample), "sequence": sequence}))
