"""`ckptd inspect`: what a checkpoint says of itself, and where the parts of one entry lie."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd.daemon.cli.output import print_columns, printable, say, say_json

if TYPE_CHECKING:
    from ckptd.checkpoint.formats.source import Entry, Source

# Values of objects are shown up to this many characters.
_SHOWN_CHARACTERS = 400


def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint, or a torch.save or safetensors file.")],
    key: Annotated[str | None, typer.Argument(help="Name of an entry.")] = None,
    *,
    stats: Annotated[bool, typer.Option("--stats", help="Read the tensor; print least, largest, mean ...")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Run the pickle of a file, whatever it names.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show a checkpoint's header and totals, or one entry's chunks with files, offsets and hashes."""
    from ckptd.checkpoint.formats.convert import open_source

    if stats and key is None:
        raise typer.BadParameter("name the tensor", param_hint="'--stats'")
    with open_source(path, trust=trust) as source:
        facts = _whole(source) if key is None else _entry(source, source.entry(key), stats=stats)
    if as_json:
        say_json(facts)
    else:
        _print(facts)


def _whole(source: Source) -> dict[str, Any]:
    """Return what is to be said of a checkpoint or a file."""
    from ckptd.checkpoint.formats.checkpoint import CheckpointSource
    from ckptd.checkpoint.formats.convert import format_of

    tensors = [entry for entry in source.entries if not entry.is_object]
    facts: dict[str, Any] = {"path": source.path, "format": str(format_of(source.path))}
    if isinstance(source, CheckpointSource):
        facts |= _of_checkpoint(source)
    dtypes: dict[str, int] = {}
    for entry in tensors:
        dtypes[entry.kind] = dtypes.get(entry.kind, 0) + entry.nbytes
    return {
        **facts,
        **{"tensors": len(tensors), "objects": len(source.entries) - len(tensors)},
        **{"elements": sum(_elements(entry) for entry in tensors), "bytes": sum(entry.nbytes for entry in tensors)},
        "chunks": sum(len(entry.boxes) for entry in source.entries),
        "bytes_by_dtype": dtypes,
    }


def _of_checkpoint(source: Any) -> dict[str, Any]:
    from ckptd.checkpoint.folder.user_data import USER_DATA
    from ckptd.checkpoint.formats.summary import summarise
    from ckptd.daemon.cli.listing import user_facts

    summary = summarise(source.path, source.index)
    header = {name: value for name, value in source.index.header.items() if name != USER_DATA}
    sizes = {file: os.path.join(source.path, file) for file in source.index.files}
    return {
        **{"origin": summary.origin, "state": str(summary.state), "world_size": summary.world_size},
        **{"saved_unix_s": summary.saved_unix_s, "hashes": source.index.has_hashes, "header": header},
        **{"pinned": summary.pinned, "user": user_facts(summary.user)},
        "files": {file: os.stat(at).st_size if os.path.exists(at) else None for file, at in sizes.items()},
    }


def _elements(entry: Entry) -> int:
    return entry.nbytes // entry.itemsize_bytes


def _entry(source: Source, entry: Entry, *, stats: bool) -> dict[str, Any]:
    """Return what is to be said of one entry."""
    facts: dict[str, Any] = {"name": entry.name, "path": entry.path, "dtype": entry.kind}
    if entry.is_object:
        data = source.object_bytes(entry)
        facts |= {"record_bytes": len(data), "value": _shown(data)}
    else:
        facts |= {"shape": entry.shape, "bytes": entry.nbytes, "requires_grad": entry.requires_grad}
    facts["chunks"] = [
        {
            **{"offsets": box.offsets, "sizes": box.sizes, "file": source.place(entry, box)},
            "offset": source.position(box),
            "xxh3_64": None if box.xxh3_64 is None else f"{box.xxh3_64:016x}",
        }
        for box in entry.boxes
    ]
    if stats:
        from ckptd.checkpoint.formats.numbers import statistics
        from ckptd.protocol.errors import Unsupported

        if entry.is_object:
            raise Unsupported(f"--stats of {entry.name}, which is no tensor,", "leave it out")
        facts["statistics"] = statistics(source, entry).facts()
    return facts


def _shown(data: bytes) -> str | None:
    """Return a plain value as text; None for what only an unpickler could tell, which is not run."""
    from ckptd.checkpoint.formats.plain import plain_value

    known, value = plain_value(data)
    return repr(value)[:_SHOWN_CHARACTERS] if known else None


def _print(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if name in {"chunks", "header", "user", "statistics", "files", "bytes_by_dtype"} and not isinstance(value, int):
            continue
        say(printable(f"{name.replace('_', ' ')}: {_text(value)}"))
    for name in ("user", "header", "files", "bytes_by_dtype", "statistics"):
        if facts.get(name):
            say(f"\n{name.replace('_', ' ')}:")
            for inner, value in facts[name].items():
                say(printable(f"  {inner}: {_text(value)}"))
    if isinstance(facts.get("chunks"), list):
        rows = [(_text(c["offsets"]), _text(c["sizes"]), c["file"], c["offset"], c["xxh3_64"]) for c in facts["chunks"]]
        heads = ("OFFSETS", "SIZES", "FILE", "BYTE", "XXH3-64")
        say("")
        print_columns(heads, [[_text(cell) for cell in row] for row in rows], right=("BYTE",))


def _text(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case tuple() | list():
            return "[" + ", ".join(map(str, value)) + "]"
    return str(value)
