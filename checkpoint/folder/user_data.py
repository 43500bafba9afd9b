"""What a user says of a checkpoint: its step, metrics and whatever else JSON can hold. Without I/O.

It lies in the header of the index, so that it appears with the checkpoint, in the same rename.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ckptd.protocol.errors import Unsupported

# The key in the index's header.
USER_DATA: Final = "user"
# It travels in the seal, which stands in the slot's control area.
MOST_BYTES: Final = 16 * 1024


@dataclass(frozen=True)
class UserData:
    """What is stored with a checkpoint.

    Attributes:
        step: The training step.
        metrics: Numbers by name, by which the best checkpoints are found.
        metadata: Anything that JSON can hold.
    """

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    metadata: Any = None

    def encode(self) -> str:
        """Return it as it is stored.

        Raises:
            Unsupported: It cannot be told in JSON, or is too long; nothing was saved.
        """
        metrics = {str(name): _number(name, value) for name, value in self.metrics.items()}
        try:
            text = json.dumps({"step": self.step, "metrics": metrics, "metadata": self.metadata}, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise Unsupported(f"metadata that JSON cannot hold ({error})", "give numbers, text, lists, dicts") from None
        if len(text) > MOST_BYTES:
            what = f"metadata of {len(text)} bytes"
            raise Unsupported(what, f"give at most {MOST_BYTES}; what is larger belongs into the state dict")
        return text


def decode_user_data(header: Mapping[str, str]) -> UserData | None:
    """Return what an index's header holds of the user's; None if there is nothing, or nothing of ours."""
    try:
        found = json.loads(header.get(USER_DATA, "null"))
        step, metrics = found["step"], found.get("metrics") or {}
        numbers = {str(name): float(value) for name, value in metrics.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return None
    return UserData(step, numbers, found.get("metadata"))


def _number(name: str, value: Any) -> float:
    """Return a metric as a plain number: a tensor of one element or a numpy scalar will do."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Unsupported(f"metric {name}={value!r} ({error})", "give a number") from None
    return int(number) if isinstance(value, int) and math.isfinite(number) and number == value else number
