"""Holds a dashboard against Grafana's schema, as its own SDK has it: unknown keys, wrong types, unknown values."""

from __future__ import annotations

import enum
import typing

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

import json  # isort: skip


def faults(board):
    """Return what the schema does not know or does not allow, as lines."""
    register_default_plugins()
    read = Dashboard.from_json(board)
    known = json.loads(json.dumps(read, cls=JSONEncoder))
    return [*_lost(board, known, "dashboard"), *_wrong(read, Dashboard, "dashboard")]


def _lost(given, known, where):
    """Yield keys that the schema's classes have not taken up."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            if key not in known:
                if value is not None:
                    yield f"{where}.{key}: unknown"
            else:
                yield from _lost(value, known[key], f"{where}.{key}")
    elif isinstance(given, list) and isinstance(known, list):
        for number, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from _lost(one, other, f"{where}[{number}]")
    elif given != known:
        yield f"{where}: {given!r} became {known!r}"


def _wrong(value, hint, where):
    """Yield values that are not of their annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any or hint is object:  # for instance the options of a panel, whose class its type decides
        if type(value).__module__.startswith("grafana"):
            yield from _wrong_instance(value, type(value), where)
        return
    if origin is typing.Union or type(hint).__name__ == "UnionType":
        if all(list(_wrong(value, choice, where)) for choice in arguments):
            yield f"{where}: {value!r} is none of {arguments}"
    elif origin is typing.Literal:
        if value not in arguments:
            yield f"{where}: {value!r} is none of {arguments}"
    elif origin is list:
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
            return
        for number, one in enumerate(value):
            yield from _wrong(one, arguments[0], f"{where}[{number}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{where}: {value!r} is no object"
    elif isinstance(hint, type):
        yield from _wrong_instance(value, hint, where)


def _wrong_instance(value, hint, where):
    if issubclass(hint, enum.Enum):
        if value not in {member.value for member in hint}:
            yield f"{where}: {value!r} is none of {[member.value for member in hint]}"
        return
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return
    if not isinstance(value, hint):
        yield f"{where}: {value!r} is no {hint.__name__}"
    elif type(value).__module__.startswith("grafana"):
        for name, inner in typing.get_type_hints(type(value)).items():
            if hasattr(value, name):
                yield from _wrong(getattr(value, name), inner, f"{where}.{name}")
