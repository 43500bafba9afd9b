"""`ckptd extract`: some entries of a checkpoint as a file of their own."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ckptd.daemon.cli.output import counted, printable, progress_bar, say, say_json


def extract(
    path: Annotated[str, typer.Argument(help="A checkpoint, or a torch.save or safetensors file.")],
    keys: Annotated[
        list[str], typer.Argument(metavar="KEY...", help="Names, what names begin with, or patterns with *.")
    ],
    *,
    output: Annotated[str, typer.Option("--output", "-o", help="A .pt, .safetensors or .npy file.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Run pickles, whatever they name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write entries to a file: a flat dict of names for .pt and .safetensors, one tensor for .npy."""
    from ckptd.checkpoint.formats.convert import Wish, open_source
    from ckptd.checkpoint.formats.extract import choose
    from ckptd.checkpoint.formats.extract import extract as write

    with open_source(path, trust=trust) as source, progress_bar("extract") as progress:
        entries = choose(source, keys)
        total = sum(entry.nbytes for entry in entries)
        wish = Wish(overwrite=overwrite, trust=trust)
        write(source, entries, output, wish=wish, done=counted(progress, total))
    names = [entry.name for entry in entries]
    if as_json:
        say_json({"output": output, "entries": names, "bytes": os.stat(output).st_size})
    else:
        say(printable(f"{output}: {len(names)} entries, {total} bytes of tensors"))
