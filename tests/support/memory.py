"""Loads that shall come from shared memory: what spoils the disk, and where the images lie."""

from __future__ import annotations

from pathlib import Path

from support.trees import below

SERVED = 'ckptd_memory_loads_total{memory="served"}'
ABSENT = 'ckptd_memory_loads_total{memory="absent"}'
OVERWRITTEN = 'ckptd_memory_loads_total{memory="overwritten"}'
DAMAGED = 'ckptd_memory_loads_total{memory="damaged"}'
SERVED_BYTES = "ckptd_memory_served_bytes_total"

# What a trainer runs. On a busy machine a healthy daemon may need more than its moment.
PATIENT = "from ckptd.client.loading import retained\nretained.ANSWER_WITHIN_S = 20.0\n"
LOAD = PATIENT + "found = state(mib, -1.0)\nreport = dcp.load(found, checkpoint_id=path)"
VALUES = "(report.source, found['model']['w'].unique().tolist(), found['model']['b'].tolist(), found['step'])"


def values(source, value):
    """What :data:`VALUES` is after a load of ``state(value=value)``."""
    return (source, [value], [0, 1, 2, 3, 4], int(value))


def spoil(checkpoint):
    """Fill the images on the disk with zeros: what is loaded from there is found to be wrong."""
    for image in Path(checkpoint).glob("*.distcp"):
        image.write_bytes(bytes(image.stat().st_size))


def arenas(daemon):
    """The files of all arenas of a daemon."""
    return below(daemon.runtime.arenas, "*.arena")
