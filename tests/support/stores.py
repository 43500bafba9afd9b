"""A key-value store that all ranks of a test share, and torch's view of a group of ranks."""

from __future__ import annotations

from datetime import timedelta


class FakeStore:
    """What torch's Store does, without waiting: what is not there yet has timed out."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.waits: list[timedelta] = []

    def set(self, key: str, value: str) -> None:
        self.content[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.content[key]

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self.waits.append(timeout)
        if not self.content.keys() >= set(keys):
            raise RuntimeError("wait timeout")  # DistStoreError is one


class FakeDist:
    """The part of torch.distributed that tells a rank who it is; any collective would be an AttributeError."""

    class group:  # noqa: N801  # as torch calls it
        WORLD = "world"

    def __init__(self, ranks: list[int], me: int) -> None:
        self.ranks, self.me = ranks, me

    def get_rank(self, group: object = None) -> int:
        return self.ranks.index(self.me)

    def get_world_size(self, group: object = None) -> int:
        return len(self.ranks)

    def get_process_group_ranks(self, group: object) -> list[int]:
        return self.ranks
