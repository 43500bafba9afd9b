"""What all errors share: how they cross processes, and the branches of the tree."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import msgspec

Fact = str | int | float | None


class ErrorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An error as it crosses a process border."""

    code: str
    facts: dict[str, Fact]


class CkptdError(RuntimeError):
    """Base of every error that ckptd raises. Derives from RuntimeError, as most of torch's do."""

    code: ClassVar[str] = "error"

    def report(self) -> ErrorReport:
        """Return this error in the form that crosses processes."""
        facts = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return ErrorReport(self.code, facts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let an error be pickled though it was made with keywords: users send failures between their processes."""
        return _remade, (type(self), self.args, vars(self))


def _remade(kind: type[CkptdError], args: tuple[Any, ...], facts: dict[str, Any]) -> CkptdError:
    error = kind.__new__(kind, *args)
    vars(error).update(facts)
    return error


class RequestError(CkptdError):
    """The caller asked for something that cannot be had as asked."""


class CapacityError(CkptdError):
    """Memory, a slot or disk space is lacking."""


class StorageError(CkptdError):
    """Bytes could not be written, read or trusted."""


class PlanError(CkptdError):
    """The ranks' items do not make up one checkpoint."""


class LifecycleError(CkptdError):
    """A process, a session or a deadline came to its end."""


@dataclass(eq=False)
class UnexpectedError(CkptdError):
    """A bug, or an error that a newer peer knows and we do not."""

    code: ClassVar[str] = "unexpected"
    text: str

    def __str__(self) -> str:
        return self.text
