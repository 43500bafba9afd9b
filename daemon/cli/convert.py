"""`ckptd convert`: from DCP to torch.save, to safetensors, and back."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import typer

from ckptd.daemon.cli.output import complain, counted, printable, progress_bar, say, say_json
from ckptd.protocol.errors import BadConfig

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


class To(StrEnum):
    """What a checkpoint can become; `ckptd.checkpoint.formats.convert.Format` without its imports."""

    dcp = "dcp"
    torch = "torch"
    safetensors = "safetensors"


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint, a torch.save file, a safetensors file or folder.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="A directory (DCP), .pt, or .safetensors; --to decides otherwise.")
    ],
    *,
    to: Annotated[To | None, typer.Option(help="Format of DST; its name tells by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Run pickles, whatever they name.")] = False,
    tensors_only: Annotated[bool, typer.Option("--tensors-only", help="Leave out what is no tensor.")] = False,
    shard_size: Annotated[
        str, typer.Option(metavar="BYTES", help="Most bytes in a file of a safetensors folder; 5G, 500MiB.")
    ] = "5G",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write SRC in another format, tensor by tensor. DST appears whole or not at all."""
    from ckptd.checkpoint.formats.convert import Format, Wish, format_named, open_source
    from ckptd.checkpoint.formats.convert import convert as write

    wish = Wish(overwrite=overwrite, trust=trust, tensors_only=tensors_only, shard_bytes=_bytes(shard_size))
    try:
        wanted = Format(to) if to is not None else format_named(target)
    except BadConfig as error:
        complain(error)
        raise typer.Exit(2) from None
    with open_source(source, trust=trust) as opened, progress_bar("convert") as progress:
        chosen = [entry for entry in opened.entries if not (tensors_only and entry.is_object)]
        total = sum(entry.nbytes for entry in chosen)
        write(opened, target, wanted, wish=wish, done=counted(progress, total))
    tensors = sum(not entry.is_object for entry in chosen)
    facts = {"tensors": tensors, "objects": len(chosen) - tensors, "bytes": total}
    if as_json:
        say_json({"source": source, "target": target, "format": str(wanted), **facts})
    else:
        text = f"{target}: {wanted}, {tensors} tensors of {total} bytes, {len(chosen) - tensors} objects"
        say(printable(text))


def _bytes(text: str) -> int:
    """Return a number of bytes that may have a unit. Raises BadParameter."""
    found = re.fullmatch(r"(\d+)([KMGT]?|[KMG]i)B?", text.strip(), re.IGNORECASE)
    if found is None or not int(found[1]):
        raise typer.BadParameter(f"{text} is no size; 5G or 500MiB is", param_hint="'--shard-size'")
    return int(found[1]) * _UNITS[found[2].upper()]
