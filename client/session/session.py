"""A session: this process's open line to the daemon, its slots, and the saves that are under way.

A save in steady state is a comparison, a copy and one message. Invariant: every save's future ends, whatever becomes of
the daemon.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import xxhash

from ckptd.checkpoint.publishing.commit import has_checkpoint
from ckptd.client.logging_handlers import note
from ckptd.client.saving.futures import SaveFuture, wait_quietly
from ckptd.client.saving.handover import HandOverSnapshot, make_hand_over_layout, take_hand_over
from ckptd.client.saving.layout import RankLayout, make_rank_layout
from ckptd.client.saving.room import claim_room
from ckptd.client.saving.save_under_way import SaveUnderWay, seal_of
from ckptd.client.saving.slots import Slot, Slots
from ckptd.client.saving.snapshot import Snapshot, make_local_plan, take_snapshot
from ckptd.client.saving.waves import Ring, WaveSave, stage_in_waves
from ckptd.client.session.identity import Identity, check_local_world, check_same_daemon
from ckptd.client.session.link import Link, LinkTimeouts
from ckptd.client.session.options import SaveRequest, SessionOptions
from ckptd.protocol import messages
from ckptd.protocol.cache_messages import (
    CacheAnswer,
)
from ckptd.protocol.crash_points import CrashPoint, reach
from ckptd.protocol.errors import (
    CheckpointExists,
    CkptdError,
    DaemonLost,
    DeadlineExceeded,
    SessionClosed,
    SlotTooSmall,
    UnexpectedError,
    Unsupported,
    from_report,
)
from ckptd.protocol.messages import (
    PROTOCOL_VERSION,
    Aborted,
    Assigned,
    Attach,
    Committed,
    DaemonMessage,
    Fenced,
    GaveUp,
    Progress,
    Propose,
    Sealed,
    SlotFreed,
)
from ckptd.staging.arena import ALIGNMENT_BYTES, SlotState
from ckptd.staging.copy import Copier, Pair

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

logger = logging.getLogger(__name__)

# New arenas get a little room, so that a few more parameters do not cost a new one.
_HEADROOM_DIVISOR: Final = 64
_ARENA_STEP_BYTES: Final = 2 << 20
_DRY_ID: Final = "/plan"


class Session:
    """An open session.

    Args:
        identity: Who we are in the job.
        options: How to behave.

    Raises:
        DaemonUnavailable: There is no daemon, and none could be started.
        MultiNode: The job's ranks are on several nodes.
        CkptdError: The daemon refused.
    """

    def __init__(self, identity: Identity, options: SessionOptions) -> None:
        check_local_world(identity)
        self.identity, self.options = identity, options
        self._lock = threading.Lock()
        self.loading = threading.Lock()  # held by the load that uses the node's cache, and sets the next line
        self.on_cache_news: Callable[[CacheAnswer | None], None] = lambda _: None
        self._staging_one_at_a_time = threading.Lock()
        self._sequence = 0
        self._saves: dict[int, SaveUnderWay] = {}
        self._slots = Slots()
        self._layout: RankLayout | None = None
        self._last_look: Snapshot | None = None
        self._last_handed_over: Snapshot | None = None
        self._last_staging: Future[None] | None = None
        self._error: CkptdError | None = None
        self._copier = Copier()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="ckptd-stage")
        request = Attach(
            PROTOCOL_VERSION,
            identity.job,
            identity.rank,
            identity.world_size,
            identity.launch,
            options.progress_timeout_s,
        )
        self._link = Link(
            request,
            timeouts=LinkTimeouts(options.connect_timeout_s, options.busy_timeout_s, options.reconnect_timeout_s),
            on_message=self._on_message,
            on_resumed=self._on_resumed,
            on_lost=self._on_lost,
        )
        try:
            check_same_daemon(identity, self._link.attached.daemon, timeout_s=options.connect_timeout_s)
            if options.slot_bytes is not None:
                self._open_arena(options.slot_bytes)
        except BaseException:
            self.close()
            raise

    # --- what callers use ----------------------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        """Whether saves can be made; a session whose daemon went away is not."""
        return self._error is None and self._link.live

    @property
    def link(self) -> Link:
        """The line to the daemon."""
        return self._link

    @property
    def incarnation(self) -> int:
        """Which incarnation of the job this session belongs to."""
        return self._link.attached.incarnation

    @property
    def daemon_pid(self) -> int:
        """Process id of the daemon."""
        return self._link.attached.pid

    @property
    def runtime_dir(self) -> str:
        """Directory of the daemon's sockets."""
        return self._link.runtime

    def identity_for_reopening(self, found: Identity) -> Identity:
        """Return who we are after the session was lost: what arguments said stays, a group is asked anew."""
        error = self._error
        silent = isinstance(error, DeadlineExceeded) and self.identity.world_size > 1
        if error is not None and (silent or isinstance(error, SessionClosed)):
            # Another incarnation of the job has taken over, or the other ranks were told that we are lost: to come
            # back unasked would fence them. connect() on all ranks is the way.
            raise error
        told = found.store is None
        return Identity(self.identity.job, self.identity.rank, self.identity.world_size) if told else found

    def prepare(self, state_dict: Mapping[str, Any], *, settings: str = "", flat: bool = False) -> None:
        """Plan, and make and touch the arena, ahead of the first save. All ranks must call it.

        Raises:
            ShmTooSmall: The arena does not fit into shared memory.
            CkptdError: The plan cannot be made.
        """
        request = SaveRequest(_DRY_ID, settings, flat, True, _no_metadata, False)
        save = self._begin(request)
        try:
            save.snapshot = self._look(state_dict, request)
            layout = self._layout_for(save, dry=True)
            if self._needs_waves(layout):
                return
            self._make_room(layout)
            for slot in self._take_free_slots():
                slot.dress(layout)
                self._slots.release(slot)
        finally:
            self._saves.pop(save.sequence, None)

    def save(self, state_dict: Mapping[str, Any], request: SaveRequest) -> SaveFuture:
        """Begin a save; what fails from here on fails the future, on all ranks alike."""
        save = self._begin(request)
        self._last_staging = save.future.staging_completion
        try:
            save.snapshot = self._look(state_dict, request)
            self._copier.mark(save.snapshot.devices())
        except CkptdError as error:
            self._give_up(save, error)
            return save.future
        except BaseException as error:  # the user's own code failed: the other ranks must not wait for us
            self._give_up(save, UnexpectedError(f"the state dict could not be read: {error!r}"))
            raise
        if request.background:
            save.future.stall_s = time.monotonic() - save.begun_s
            self._background.submit(self._stage, save)
        else:
            self._stage(save)
            save.future.stall_s = time.monotonic() - save.begun_s
        return save.future

    def wait_for_staging(self) -> None:
        """Wait until the tensors of the last save may change; a failed staging lets the trainer go on, too."""
        staging = self._last_staging
        if staging is not None:
            bound_s = self.options.busy_timeout_s + self.options.progress_timeout_s
            wait_quietly(staging, timeout_s=bound_s)
            self._last_staging = None

    def close(self) -> None:
        """End the session. What is sealed is finished by the daemon; futures that are not done by then fail."""
        self._background.shutdown(wait=True)
        self._link.close()
        self._fail_all(SessionClosed("close() was called; the daemon finishes what was staged"))
        self._copier.close()
        self._slots.drop(orphaned=isinstance(self._error, DaemonLost) or self._link.resuming)

    # --- the steps of a save -------------------------------------------------------------------------------------

    def _begin(self, request: SaveRequest) -> SaveUnderWay:
        with self._lock:
            if self._error is not None:
                raise self._error
            self._sequence += 1
            save = SaveUnderWay(self._sequence, request, time.monotonic(), None)  # type: ignore[arg-type]
            # The future must not hold the save that holds it: such rings wait for the collector, and memory creeps up.
            committed = save.committed
            save.future = SaveFuture(
                request.checkpoint_id, lambda: request.read_metadata(request.checkpoint_id, committed[0])
            )
            save.future.rank = self.identity.rank
            self._saves[save.sequence] = save
        reach(CrashPoint.CLIENT_SCHEDULED)
        return save

    def _look(self, state_dict: Mapping[str, Any], request: SaveRequest) -> Snapshot:
        if request.hand_over is not None:
            if not self._link.attached.user_code:
                what = f"{request.hand_over} in a daemon that runs no users' code"
                raise Unsupported(what, "set user_code = true in its configuration, or leave planner and writer out")
            handed_over = take_hand_over(state_dict, request.hand_over, last=self._last_handed_over)
            self._last_handed_over = handed_over.forget()
            return handed_over
        snapshot = take_snapshot(state_dict, last=self._last_look, flat=request.flat)
        self._last_look = snapshot.forget()
        return snapshot

    def _stage(self, save: SaveUnderWay) -> None:
        """Copy into a slot and seal it. Whatever goes wrong becomes the save's failure, on all ranks."""
        try:
            with self._staging_one_at_a_time:
                self._stage_now(save)
        except CkptdError as error:
            self._give_up(save, error)
        except Exception as error:  # noqa: BLE001  # torch's own errors: the other ranks must hear of them
            self._give_up(save, UnexpectedError(f"staging failed: {error!r}"))
        except BaseException:
            self._give_up(save, UnexpectedError("staging was interrupted"))
            raise

    def _stage_now(self, save: SaveUnderWay) -> None:
        snapshot = save.snapshot
        assert snapshot is not None
        layout = self._layout_for(save)
        self._claim_room(save, layout)
        if self._needs_waves(layout):
            self._stage_in_waves(save, layout, snapshot)
            return
        self._make_room(layout)
        save.plan_s = time.monotonic() - save.begun_s
        note("save", "plan", save.future.checkpoint_id, self.identity.rank, save.plan_s)
        slot = self._slots.acquire(
            on_busy=self.options.on_busy,
            timeout_s=self.options.busy_timeout_s,
            checkpoint_id=save.request.checkpoint_id,
            rank=self.identity.rank,
        )
        try:
            begun = time.monotonic()
            slot.set_state(SlotState.STAGING, sequence=save.sequence)
            reach(CrashPoint.CLIENT_STAGING)
            object_bytes = self._copy(slot, layout, snapshot)
            reach(CrashPoint.CLIENT_STAGED)
            stage_s = time.monotonic() - begun
            note("save", "stage", save.future.checkpoint_id, self.identity.rank, stage_s, nbytes=layout.image_bytes)
        except BaseException:
            self._slots.release(slot)
            raise
        if save.future.done():  # another rank has failed the save meanwhile
            self._slots.release(slot)
            save.future.note_staged(0)
            return
        self._seal(save, slot, seal_of(save, slot, layout, object_bytes, stage_s))

    def _needs_waves(self, layout: RankLayout) -> bool:
        """Whether an image goes through the slots range by range; a hand-over's pickle must be whole in one."""
        fits = layout.slot_bytes <= self._slots.slot_bytes
        return self.options.staging == "waves" and layout.code_offset is None and not fits

    def _stage_in_waves(self, save: SaveUnderWay, layout: RankLayout, snapshot: Snapshot) -> None:
        options, future = self.options, save.future
        save.plan_s = time.monotonic() - save.begun_s
        note("save", "plan", future.checkpoint_id, self.identity.rank, save.plan_s)
        who = (save.sequence, save.request.checkpoint_id, self.identity.rank)
        waves = WaveSave(*who, options.on_busy, options.busy_timeout_s, future.done)
        ring = Ring(self._slots, self._copier, self._link.send_encoded)
        staged = stage_in_waves(waves, layout, snapshot.sources, ring)
        if staged is None:  # another rank has failed the save meanwhile
            future.note_staged(0)
            return
        note("save", "stage", future.checkpoint_id, self.identity.rank, staged.stage_s, nbytes=layout.image_bytes)
        seal = seal_of(save, staged.slot, layout, staged.object_bytes, staged.stage_s)
        self._seal(save, staged.slot, staged.put_into(seal))

    def _copy(self, slot: Slot, layout: RankLayout, snapshot: Snapshot) -> bytes:
        """Stage every item and return the column of the objects' lengths."""
        dressed = slot.dress(layout)
        pairs: list[Pair] = []
        lengths: list[int] = []
        for position, (item, target) in enumerate(zip(layout.items, dressed.targets, strict=True)):
            source = snapshot.sources[item]
            if isinstance(source, bytes):
                dressed.put_object(position, source)
                lengths.append(len(source))
            elif target is not None:
                pairs.append((target, source))
        self._copier.copy(pairs)
        return b"".join(length.to_bytes(8, "little") for length in lengths)

    def _seal(self, save: SaveUnderWay, slot: Slot, message: Sealed) -> None:
        now = time.monotonic()
        seal = messages.encode(message)
        save.said = seal
        slot.seal(seal, sequence=save.sequence)
        reach(CrashPoint.CLIENT_SEAL_WRITTEN)
        save.snapshot = None  # what is staged needs no reference to the state dict
        save.future.note_staged(message.image_bytes)  # first: an answer may be here before the next line
        self._link.send_encoded(seal)
        reach(CrashPoint.CLIENT_SEAL_SENT)
        note("save", "seal", save.future.checkpoint_id, self.identity.rank, time.monotonic() - now)

    def _give_up(self, save: SaveUnderWay, error: CkptdError) -> None:
        save.snapshot = None
        save.future.note_staging_failed(error)
        if self.live and not save.future.done():
            # The daemon tells all ranks alike, this one included.
            self._say(save, GaveUp(save.sequence, save.request.checkpoint_id, error.report()))
        else:
            save.future.note_failed(error)

    def _say(self, save: SaveUnderWay, message: Propose | GaveUp) -> None:
        save.said = messages.encode(message)
        self._link.send_encoded(save.said)

    # --- layouts and room ----------------------------------------------------------------------------------------

    def _layout_for(self, save: SaveUnderWay, *, dry: bool = False) -> RankLayout:
        """Return the cached layout if the structure is unchanged, else have the daemon plan."""
        snapshot, layout = save.snapshot, self._layout
        assert snapshot is not None
        structure = (save.request.settings, snapshot.structure)
        if layout is not None and layout.structure == structure and not dry:
            return layout
        if isinstance(snapshot, HandOverSnapshot):
            self._layout = layout = make_hand_over_layout(structure, snapshot)
            return layout
        plan = make_local_plan(snapshot, settings=save.request.settings)
        if plan.items != len(snapshot.sources):
            raise UnexpectedError(f"{len(snapshot.sources)} sources for {plan.items} items")
        encoded = plan.encode()
        digest = xxhash.xxh3_128_hexdigest(encoded)
        self._say(save, Propose(save.sequence, save.request.checkpoint_id, digest, encoded, dry))
        reach(CrashPoint.CLIENT_PROPOSED)
        # The daemon's own deadline ends this wait; the factor is for a daemon that is itself late.
        try:
            assigned = save.assigned.result(timeout=2 * self.options.progress_timeout_s)
        except TimeoutError:
            raise UnexpectedError("the daemon neither planned nor refused in time") from None
        reach(CrashPoint.CLIENT_ASSIGNED)
        layout = make_rank_layout(structure, digest, plan, assigned.assigned, job_bytes=assigned.job_bytes)
        with self._lock:
            if save.sequence in self._saves:  # else it has failed meanwhile, and nobody knows this plan any more
                self._layout = layout
        return layout

    def _claim_room(self, save: SaveUnderWay, layout: RankLayout) -> None:
        """Refuse a save that its volume has no room for, or whose name is taken, before a byte is staged."""
        if save.request.hand_over is None:
            if not save.request.overwrite and has_checkpoint(save.request.checkpoint_id):
                raise CheckpointExists(save.request.checkpoint_id)  # what comes by then is seen when it is published
            others = [other.claim for other in list(self._saves.values()) if other.claim is not None]
            marks = f"-{self.incarnation}-{save.sequence}-"
            save.claim = claim_room(save.request.checkpoint_id, marks, layout.job_bytes, others)

    def _make_room(self, layout: RankLayout) -> None:
        if layout.slot_bytes <= self._slots.slot_bytes:
            return
        if self.options.slot_bytes is not None:
            raise SlotTooSmall(layout.slot_bytes, self._slots.slot_bytes)
        self._open_arena(layout.slot_bytes + layout.slot_bytes // _HEADROOM_DIVISOR)

    def _open_arena(self, slot_bytes: int) -> None:
        step = _ARENA_STEP_BYTES if slot_bytes > _ARENA_STEP_BYTES else ALIGNMENT_BYTES
        self._slots.wait_all_free(timeout_s=self.options.busy_timeout_s)
        self._slots.drop()
        arena = self._link.open_arena(slots=self.options.slots, slot_bytes=-(-slot_bytes // step) * step)
        self._slots.adopt(arena, touch_threads=self.options.touch_threads)

    def _take_free_slots(self) -> list[Slot]:
        return [
            self._slots.acquire(on_busy="fail", timeout_s=0, checkpoint_id=_DRY_ID, rank=self.identity.rank)
            for _ in range(self.options.slots)
        ]

    # --- news from the daemon, in the link's thread --------------------------------------------------------------

    def _on_message(self, message: DaemonMessage) -> None:
        match message:
            case SlotFreed():
                self._slots.freed(message.arena, message.slot)
            case Fenced():
                self._on_lost(from_report(message.error))
            case CacheAnswer():
                self.on_cache_news(message)
            case Assigned() | Progress() | Committed() | Aborted():
                save = self._saves.get(message.sequence)
                if save is not None:
                    self._on_news(save, message)

    def _on_news(self, save: SaveUnderWay, news: Assigned | Progress | Committed | Aborted) -> None:
        match news:
            case Assigned():
                if not save.assigned.done():
                    save.assigned.set_result(news)
            case Progress():
                save.future.note_progress(news.bytes_done, news.bytes_total)
            case Committed():
                reach(CrashPoint.CLIENT_COMMITTED)
                save.committed.append(news)
                self._saves.pop(save.sequence, None)
                save.future.note_committed()
            case Aborted():
                with self._lock:
                    self._saves.pop(save.sequence, None)
                    if news.replan:
                        self._layout = None
                self._end(save, from_report(news.error))

    def _end(self, save: SaveUnderWay, error: CkptdError) -> None:
        self._saves.pop(save.sequence, None)
        save.future.note_failed(error)
        if not save.assigned.done():
            save.assigned.set_exception(error)

    def _on_resumed(self) -> None:
        """A successor has taken the session up: what the daemon before it may not have got is said again."""
        self._slots.look_again()
        self.on_cache_news(None)
        for save in list(self._saves.values()):
            if save.said:
                self._link.send_encoded(save.said)

    def _on_lost(self, error: CkptdError) -> None:
        logger.warning("session of job %s lost: %s", self.identity.job, error)
        self._fail_all(error)

    def _fail_all(self, error: CkptdError) -> None:
        with self._lock:
            self._error = self._error or error
            saves = list(self._saves.values())
        self._slots.fail(error)
        self.on_cache_news(None)
        for save in saves:
            self._end(save, error)


def _no_metadata(_checkpoint_id: str, _committed: Committed) -> Metadata:
    raise UnexpectedError("a plan made ahead has no metadata")
