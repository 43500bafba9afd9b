"""A process that gives damaged input to one reader and says what came of it; it may use little memory and time.

Run as ``python fuzzing.py TARGET FIRST COUNT``: prints one JSON object. Whatever the input, a reader may answer, or
raise one of our errors. Anything else, a MemoryError too, is told with the seed that makes it.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

from support.messages import SAMPLES
from support.mutations import mutated

from ckptd.protocol import messages
from ckptd.protocol.errors import CkptdError, from_report

# What reading some kilobytes may take beyond what the process has at its start.
MEMORY_BYTES = 96 << 20
SECONDS = 2.0
_BORDER = b"--- the other file ---"


def _message_targets():
    for decode, samples in SAMPLES.items():
        yield decode.__name__, (lambda decode=decode: _message(decode), [messages.encode(each) for each in samples])
    attach = messages.encode(SAMPLES[messages.decode_attach_request][0])
    yield "decode_attach_version", (lambda: messages.decode_attach_version, [attach])


def _message(decode):
    def read(data):
        message = decode(data)
        assert decode(messages.encode(message)) == message
        error = getattr(message, "error", None)
        if error is not None:
            str(from_report(error))

    return read


def _index_targets():
    from support.checkpoints import make_checkpoint

    from ckptd.checkpoint.indexing.index import decode_index, encode_index
    from ckptd.checkpoint.stock.metadata_pickle import encode_metadata
    from ckptd.checkpoint.stock.metadata_unpickle import decode_metadata

    index, _ = make_checkpoint()
    ours = [encode_index(index)]
    stock = [encode_metadata(index, checkpoint_id="/a/b", save_id="c"), *stock_metadata()]
    yield "decode_index", (lambda: lambda data: decode_index(data, "here"), ours)
    yield "decode_index without its hash", (_unhashed, ours)
    yield "decode_metadata", (lambda: lambda data: decode_metadata(data, "here"), stock)
    yield "read_index", (_read_index, [ours[0] + _BORDER + each for each in stock])


def stock_metadata():
    """Return what real versions of torch have written, where it has been kept."""
    return [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.metadata"))]


def _unhashed():
    """Read an index whose hash has been made to fit, so that what stands behind it is reached."""
    from ckptd.checkpoint.indexing import index as module

    module._digest = lambda header, columns: "fits"
    check = module.decode_index

    def read(data):
        begin = data.find(b'"xxh3_64": "')
        if begin >= 0:
            begin += len(b'"xxh3_64": "')
            data = data[:begin] + b"fits" + data[begin + 16 :]
            length = int.from_bytes(data[:8], "little") - 12
            data = max(length, 0).to_bytes(8, "little") + data[8:]
        check(data, "here")

    return read


def _read_index():
    from ckptd.checkpoint.indexing.open import read_index

    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def read(data):
        begin, _, end = data.partition(_BORDER)
        (folder / ".ckptd").write_bytes(begin)
        (folder / ".metadata").write_bytes(end)
        read_index(str(folder))

    return read


def _plan_targets():
    from support.plans import Held, local_plan, rows

    from ckptd.checkpoint.planning.items import decode_plan
    from ckptd.checkpoint.planning.plan import make_plan
    from ckptd.checkpoint.planning.planfile import load_plan, store_plan

    plans = [
        local_plan({"w": rows(0, 3, of=(8, 4)), "o": 512, "r": Held((9,))}),
        local_plan({"w": rows(3, 8, of=(8, 4)), "o": 512, "r": Held((9,)), "big": Held((2048,))}),
    ]

    def plan(data):
        make_plan([decode_plan(data), plans[1]])

    def lengths():
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            store_plan(f"{folder}/plan", make_plan(plans))
            return load_plan(f"{folder}/plan").ranks[0].true_bytes

    yield "decode_plan", (lambda: decode_plan, [each.encode() for each in plans])
    yield "make_plan", (lambda: plan, [plans[0].encode()])
    yield "object lengths", (lengths, [struct.pack("<q", 100)])


def _arena_targets():
    from ckptd.daemon.session.sessions import ArenaFile, Peer, Session
    from ckptd.staging.arena import HEADER_BYTES, create_arena

    seal, slots, slot_bytes = SAMPLES[messages.decode_client_message][2], 4, 1 << 20
    text = messages.encode(seal)
    header = struct.pack("<8sIIQ", b"ckptd\0\0\1", 1, slots, slot_bytes).ljust(64, b"\0")
    states = b"".join(struct.pack("<IIQ", state, len(text), 7) for state in (2, 0, 1, 3))

    def make():
        path = f"/dev/shm/ckptd-fuzz-{os.getpid()}.arena"
        descriptor = create_arena(path, slots=slots, slot_bytes=slot_bytes)
        os.unlink(path)
        # The slots of a trainer may be as large as its state, so that this bounds no length that it writes.
        session = Session(Peer(1, 0, 0), None, 0, 1)
        session.arenas[seal.arena] = ArenaFile(seal.arena, path, descriptor, slots, 1 << 40)

        def read(data):
            os.pwrite(descriptor, data, 0)
            os.ftruncate(descriptor, len(data) if len(data) % 3 == 0 else 1 << 30)
            session.status()
            if list(session.seals_left_behind()) != [seal]:
                raise messages.BadMessage("another seal than was written, or none")

        return read

    yield "arena", (make, [(header + states).ljust(HEADER_BYTES, b"\0") + text])


def targets():
    """Return the readers and the samples whose damaged forms they get, by name."""
    found = {}
    for group in (_message_targets, _index_targets, _plan_targets, _arena_targets):
        found.update(group())
    return found


NAMES = (
    *(decode.__name__ for decode in SAMPLES),
    *("decode_attach_version", "decode_index", "decode_index without its hash", "decode_metadata", "read_index"),
    *("decode_plan", "make_plan", "object lengths", "arena"),
)


def main():
    """Give one reader all its seeds."""
    name, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    make, samples = targets()[name]
    read = make()
    for sample in samples:
        read(sample)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    wrong, answered, refused = [], 0, 0
    for seed in range(first, first + count):
        data = mutated(samples, seed)
        begun = time.process_time()
        try:
            read(data)
            answered += 1
        except CkptdError as error:
            str(error)
            refused += 1
        except BaseException as error:  # noqa: BLE001  # it is what is looked for
            wrong.append((seed, f"{type(error).__name__}: {error}"[:200]))
        if time.process_time() - begun > SECONDS:
            wrong.append((seed, f"it took {time.process_time() - begun:.1f} s"))
        if len(wrong) >= 10:
            break
    print(json.dumps({"wrong": wrong, "answered": answered, "refused": refused}))


if __name__ == "__main__":
    main()
