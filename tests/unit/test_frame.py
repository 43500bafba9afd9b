"""The frame: every byte that is no payload, hashed as one."""

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.image.frame import frame_hash, frame_hashes, frame_header, frame_ranges


def ranges(payloads, file_bytes):
    offsets, lengths = np.array(payloads, np.int64).reshape(-1, 2).T
    return list(frame_ranges(offsets, lengths, file_bytes))


def test_the_frame_is_what_payloads_leave():
    assert ranges([(10, 5), (20, 4)], 30) == [(0, 10), (15, 20), (24, 30)]


def test_neighbours_and_empty_payloads_leave_nothing_between_them():
    assert ranges([(0, 5), (5, 0), (5, 5)], 10) == []


def test_the_order_of_the_items_does_not_matter():
    assert ranges([(20, 4), (10, 5)], 30) == ranges([(10, 5), (20, 4)], 30)


def test_a_file_without_payloads_is_all_frame():
    assert ranges([], 7) == [(0, 7)]


def test_the_hash_is_that_of_the_stretches_in_order():
    data = bytes(range(30))
    found = frame_hash(iter(ranges([(10, 5)], 30)), lambda begin, end: data[begin:end])
    assert found == xxh3_64_intdigest(data[:10] + data[15:])


def test_every_bit_of_the_frame_counts():
    data = bytearray(30)
    whole = frame_hash(iter(ranges([(10, 5)], 30)), lambda begin, end: bytes(data[begin:end]))
    for at in (0, 9, 15, 29):
        data[at] ^= 1
        assert frame_hash(iter(ranges([(10, 5)], 30)), lambda begin, end: bytes(data[begin:end])) != whole
        data[at] ^= 1


class Header:
    """The part of an index that the frame needs."""

    def __init__(self, header, files):
        self.header, self.files = header, files


def test_hashes_come_back_from_the_header():
    assert frame_hashes(Header(frame_header([1, 2**64 - 1]), ["a", "b"])) == [1, 2**64 - 1]


@pytest.mark.parametrize("text", ["", "[", "[1]", '["zz"]', '["01"]', "{}", "null", '["01", "02", "03"]'])
def test_a_header_that_is_not_ours_holds_no_hashes(text):
    assert frame_hashes(Header({"frame_hashes": text}, ["a", "b"])) == []
