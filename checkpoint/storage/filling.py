"""Writes items into files: as ``torch.save`` records, through extensions, or as a safetensors file.

Invariant: every item that was given has a result, or an error is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO, cast

from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from ckptd.checkpoint.image.layout import SMALL_ALIGNMENT_BYTES
from ckptd.checkpoint.storage.copy_ahead import resolved_objects, resolved_tensors
from ckptd.checkpoint.storage.options import SerializationFormat, WriterOptions
from ckptd.checkpoint.storage.payload import Payload, object_payload, tensor_payload
from ckptd.checkpoint.storage.placement import FileReport, PlacedItem
from ckptd.checkpoint.storage.safetensors_file import write_safetensors
from ckptd.checkpoint.storage.sink import RawStream, RecordStream, Sink, abort_after_failure
from ckptd.staging.arena import ALIGNMENT_BYTES


def fill_file(
    sink: Sink,
    name: str,
    items: Sequence[WriteItem],
    planner: SavePlanner,
    *,
    options: WriterOptions,
    check: Callable[[], None],
) -> list[WriteResult]:
    """Write items to a new file and finish it.

    Args:
        sink: The file; closed when all went well, aborted otherwise.
        name: Its name in the checkpoint.
        items: What goes into it.
        planner: Resolves them.
        options: The writer's.
        check: Called before each item; raises when another thread has failed.

    Returns:
        A result for each item, in the order of the file.
    """
    report = FileReport(name)
    stream = RecordStream(sink)
    try:
        results = _fill(stream, report, items, planner, options, check)
        sink.close()
    except BaseException:
        abort_after_failure(sink)
        raise
    report.nbytes, report.frame_hash = stream.offset, stream.frame_hash
    return results


def _fill(
    stream: RecordStream,
    report: FileReport,
    items: Sequence[WriteItem],
    planner: SavePlanner,
    options: WriterOptions,
    check: Callable[[], None],
) -> list[WriteResult]:
    results = []
    for item, data in resolved_objects(items, planner):
        check()
        results.append(_write_record(stream, report, item, object_payload(data), options))
    if options.serialization_format is SerializationFormat.SAFETENSORS:
        return results + write_safetensors(stream, report, items, planner, options.copy_ahead_bytes, check)
    for item, tensor in resolved_tensors(items, planner, ahead_bytes=options.copy_ahead_bytes):
        check()
        results.append(_write_record(stream, report, item, tensor_payload(tensor), options))
    return results


def _write_record(
    stream: RecordStream, report: FileReport, item: WriteItem, payload: Payload, options: WriterOptions
) -> WriteResult:
    write = _write_transformed if options.extensions else _write_plain
    placed = write(stream, report, payload, options)
    return WriteResult(index=item.index, size_in_bytes=placed.length, storage_data=placed)


def _write_plain(stream: RecordStream, report: FileReport, payload: Payload, options: WriterOptions) -> PlacedItem:
    nbytes = len(payload.values)
    page = payload.prefix and nbytes >= ALIGNMENT_BYTES
    stream.pad(ALIGNMENT_BYTES if page else SMALL_ALIGNMENT_BYTES, before=len(payload.prefix))
    begin = stream.offset
    stream.frame(payload.prefix)
    data_offset = stream.offset
    found = stream.payload(payload.values)
    stream.frame(payload.suffix)
    placed = PlacedItem(report.name, begin, stream.offset - begin, file=report)
    if payload.known:
        placed.data_offset, placed.data_bytes, placed.item_hash = data_offset, nbytes, found
    return placed


def _write_transformed(
    stream: RecordStream, report: FileReport, payload: Payload, options: WriterOptions
) -> PlacedItem:
    begin = stream.offset
    output = cast("IO[bytes]", RawStream(stream.raw))
    # The last one is the nearest to the file, as the order of descriptors says. Stock wraps the other way round, and
    # cannot read what it writes with several extensions.
    for extension in reversed(options.extensions):
        output = extension.transform_to(output)
    for part in (payload.prefix, payload.values, payload.suffix):
        output.write(part)
    output.close()
    descriptors = [extension.get_descriptor() for extension in reversed(options.extensions)]
    return PlacedItem(report.name, begin, stream.offset - begin, descriptors, file=report)
