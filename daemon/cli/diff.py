"""`ckptd diff`: what differs between two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd.daemon.cli.output import counted, printable, progress_bar, say, say_json

if TYPE_CHECKING:
    from ckptd.checkpoint.formats.compare import Difference


def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, or a torch.save or safetensors file.")],
    right: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    *,
    values: Annotated[bool, typer.Option("--values/--no-values", help="Whether values are compared.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing; stop at the first difference.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Run pickles of files, whatever they name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
) -> None:
    """Compare names, shapes, dtypes and values. Exit status 0: the same, 1: different."""
    from ckptd.checkpoint.formats.compare import compare
    from ckptd.checkpoint.formats.convert import open_source

    differences = 0
    listed: list[dict[str, Any]] = []
    with (
        open_source(left, trust=trust) as one,
        open_source(right, trust=trust) as other,
        progress_bar("diff") as progress,
    ):
        total = sum(entry.nbytes for entry in one.entries)
        for found in compare(one, other, values=values, done=counted(progress, total)):
            differences += 1
            if quiet:
                break
            if as_json:
                listed.append(_facts(found))
            else:
                say(printable(_line(found)))
    if as_json and not quiet:
        say_json({"same": not differences, "left": left, "right": right, "differences": listed})
    raise typer.Exit(1 if differences else 0)


def _facts(found: Difference) -> dict[str, Any]:
    facts = {"name": found.name, "kind": str(found.kind), "left": found.left or None, "right": found.right or None}
    return {**facts, "elements": found.elements, "largest": found.largest}


def _line(found: Difference) -> str:
    from ckptd.checkpoint.formats.compare import Kind

    match found.kind:
        case Kind.ONLY_LEFT:
            return f"- {found.name}: {found.left}"
        case Kind.ONLY_RIGHT:
            return f"+ {found.name}: {found.right}"
        case Kind.TYPE:
            return f"! {found.name}: {found.left} -> {found.right}"
    if found.elements is None:
        return f"~ {found.name}: {found.left} -> {found.right}"
    largest = "" if found.largest is None else f", by {found.largest:.6g} at most"
    return f"~ {found.name}: {found.left}, {found.elements} elements differ{largest}"
