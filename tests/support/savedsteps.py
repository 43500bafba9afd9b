"""A recorded save, and what its checkpoint id shows after a power failure."""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path

from support.powerloss import Disk, Recording, Rename, Sync

from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.protocol.errors import CkptdError, UnknownCheckpoint


class RecordedSave:
    """The steps of a save of one id.

    Args:
        checkpoint_id: The id.
        steps: What was there before, without a step; :meth:`take` brings the steps.
        fails: Whether the save is told to have failed, so that the id goes on showing what it did.

    A reader may see "old", "new", "nothing", or what must not be: "torn".
    """

    def __init__(self, checkpoint_id: str, steps: Recording, *, fails: bool) -> None:
        self.id, self.steps, self.fails = checkpoint_id, steps, fails
        self._contents: dict[int, bytes] = {}
        self._wholes: dict[int, tuple[str, dict[str, int]]] = {}
        self._written: dict[int, frozenset] = {}
        old = steps.find(steps.before, checkpoint_id)
        self.before = "nothing" if old is None else "old"
        if old is not None:
            self._wholes[old] = ("old", steps.before[old])

    def keep_contents(self, names: dict[int, dict[str, int]]) -> None:
        """Keep the content of all files as they are now."""

        def look(inode: int, path: Path) -> None:
            if path.is_dir():
                for name, inner in names.get(inode, {}).items():
                    look(inner, path / name)
            else:
                self._contents[inode] = path.read_bytes()

        look(0, Path(self.steps.root))

    def take(self, steps: Recording) -> None:
        """Take the steps, right after they were made."""
        self.steps = steps
        end = steps.all_kept(len(steps.steps))
        self._written = end.writes
        self.keep_contents(end.names)
        name = Path(self.id).name
        for number, step in enumerate(steps.steps):
            for _, changed, meaning in step.changes if isinstance(step, Rename) else ():
                if changed == name and meaning is not None and meaning not in self._wholes:
                    self._wholes[meaning] = ("new", steps.all_kept(number + 1).names[meaning])

    def syncs(self, name: str) -> list[int]:
        """Return the numbers of the fsyncs of what has a name; "hidden" is the hidden directory's."""
        return [
            number
            for number, step in enumerate(self.steps.steps)
            if isinstance(step, Sync) and name in {Path(step.path).name, _kind(step.path)}
        ]

    def shows(self, disk: Disk, path: str | None = None) -> str:
        """Return what a reader of a disk sees under the id, or another path."""
        inode = self.steps.find(disk.names, path or self.id)
        if inode is None:
            return "nothing"
        label, wanted = self._wholes.get(inode, ("torn", {}))
        return label if self._holds(disk, inode, wanted) else "torn"

    def _holds(self, disk: Disk, inode: int, wanted: dict[str, int]) -> bool:
        held = disk.names.get(inode, {})
        return all(
            held.get(name) == inner
            and disk.writes.get(inner) == self._written.get(inner)
            and self._holds(disk, inner, self._folder(inner))
            for name, inner in wanted.items()
        )

    def _folder(self, inode: int) -> dict[str, int]:
        """Return what a folder of a user's must hold."""
        return self.steps.before.get(inode) or self.steps.all_kept(len(self.steps.steps)).names.get(inode, {})

    def faults(self, steps: Recording | None = None) -> list[tuple[int, str]]:
        """Return what must not be seen but may be: after how many steps, and what it is.

        Args:
            steps: Others than were recorded.
        """
        steps = steps or self.steps
        total, found = len(steps.steps), []
        for count in range(total + 1):
            allowed = {"new", self.before}
            if count == total:
                allowed = {self.before if self.fails else "new"}
            for disk in steps.disks(count):
                shown = self.shows(disk)
                if shown not in allowed and not (shown == "nothing" and self._waits_beside(disk)):
                    found.append((count, shown))
        return found

    def _waits_beside(self, disk: Disk) -> bool:
        """Say whether the old checkpoint waits, whole, between the two renames that stand in for an exchange."""
        parent = Path(self.id).parent
        names = disk.names.get(self.steps.find(disk.names, str(parent)), {})
        return any(self.shows(disk, str(parent / name)) == "old" for name in names if name.endswith(".old"))

    def compare_with_readers(self) -> collections.Counter:
        """Check that after each step real readers see on real files what the model says; return how often what."""
        seen = collections.Counter()
        for count in range(len(self.steps.steps) + 1):
            for disk in (self.steps.all_lost(count), self.steps.all_kept(count)):
                with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
                    place = Path(directory, "root")
                    self.materialize(disk, place)
                    shown = self.read(place)
                assert shown == self.shows(disk), (count, shown)
                seen[shown] += 1
        return seen

    def read(self, root: Path) -> str:
        """Return what a reader sees of the id in a copy of the root."""
        path = root / Path(self.id).relative_to(self.steps.root)
        try:
            if verify_checkpoint(str(path)).faults:
                return "torn"
            save_id = read_index(str(path)).header["save_id"]
        except UnknownCheckpoint:
            return "nothing" if not path.exists() else "torn"
        except CkptdError:
            return "torn"
        return "old" if save_id == self._old_save_id(root) else "new"

    def _old_save_id(self, root: Path) -> str | None:
        if self.before == "nothing":
            return None
        [old] = [held for label, held in self._wholes.values() if label == "old"]
        probe = root.with_name(f"{root.name}.old-index")
        probe.mkdir(exist_ok=True)
        (probe / ".ckptd").write_bytes(self._contents[old[".ckptd"]])
        return read_index(str(probe)).header["save_id"]

    def materialize(self, disk: Disk, target: Path) -> None:
        """Make real files of what a disk holds; bytes that did not reach it are zeros."""

        def make(inode: int, path: Path) -> None:
            if inode in disk.names or inode not in self._contents:
                path.mkdir()
                for name, inner in disk.names.get(inode, {}).items():
                    make(inner, path / name)
            else:
                path.write_bytes(self._content(inode, disk))

        make(0, target)

    def _content(self, inode: int, disk: Disk) -> bytes:
        content = self._contents[inode]
        if inode not in self._written:
            return content
        kept = bytearray(len(content) if disk.writes.get(inode) else 0)
        for write in disk.writes.get(inode, ()):
            kept[write.offset : write.offset + write.nbytes] = content[write.offset : write.offset + write.nbytes]
        return bytes(kept)


def _kind(path: str) -> str:
    return "hidden" if ".ckptd-" in Path(path).name else ""
