"""The daemon has waves written, gives their slots back, and takes no image for whole that is not."""

from __future__ import annotations

import asyncio
import os

import pytest

from ckptd.daemon.job.generation import CurrentPlan, Generation, RankWaves, Seal
from ckptd.daemon.job.waves import SaveHooks, Waves
from ckptd.daemon.recovery.job_log import JobLog
from ckptd.daemon.recovery.journal import Journal
from ckptd.daemon.recovery.records import WaveRecord
from ckptd.daemon.session.sessions import ArenaFile, Peer, Session
from ckptd.daemon.settings.config import Config
from ckptd.protocol.errors import BadMessage, DiskFull, UnexpectedError, WriteIncomplete
from ckptd.protocol.messages import Sealed, SlotFreed
from ckptd.protocol.save import RankFell, RankStages, SaveRules
from ckptd.protocol.wave_messages import WaveSealed, WaveWritten, WriteWaveTask
from ckptd.protocol.waves import Wave, WaveRing
from ckptd.staging.arena import SlotState, create_arena

PAGE = 4096
SLOT_BYTES = 4 * PAGE
IMAGE_BYTES = 3 * PAGE


class Pool:
    """Workers that write when they are told to."""

    def __init__(self):
        self.tasks, self.answers = [], []

    async def run(self, task, *, on_progress):
        self.tasks.append(task)
        answer = asyncio.get_running_loop().create_future()
        self.answers.append(answer)
        on_progress(1)
        return await answer


class Crew:
    """One rank with an arena of three slots, and a save of it."""

    def __init__(self, tmp_path):
        self.pool, self.sent, self.failed, self.progress, self.tasks = Pool(), [], [], [], []
        path = str(tmp_path / "arena")
        descriptor = create_arena(path, slots=3, slot_bytes=SLOT_BYTES)
        self.arena = ArenaFile(5, path, descriptor, 3, SLOT_BYTES)
        self.session = Session(Peer(1, 0, 0), None, 0, 1)
        self.session.arenas[5] = self.arena
        self.sessions = {0: self.session}
        plan = CurrentPlan("/plan", ("d",), (IMAGE_BYTES,), (1, 9))
        self.journal = Journal(str(tmp_path))
        self.log = JobLog(self.journal, 1)
        self.generation = Generation(1, 9, "save", SaveRules(1, ("d",), (IMAGE_BYTES,)), plan)
        self.generation.rules.handle(RankStages(0, "/runs/7", "d", IMAGE_BYTES))
        hooks = SaveHooks(
            begin=lambda generation, work: self.tasks.append(asyncio.create_task(work)),
            fail=lambda generation, rank, error: self.failed.append((rank, error)),
            progress=lambda generation, rank, nbytes: self.progress.append(nbytes),
            pool=lambda: self.pool,
            send=lambda session, message: self.sent.append(message),
        )
        self.waves = Waves(self, Config(), hooks)

    async def take(self, begin, slot, nbytes=PAGE):
        wave = WaveSealed(9, "/runs/7", "d", 5, slot, 2 * PAGE, IMAGE_BYTES, begin, nbytes)
        self.waves.take(self.generation, 0, wave, self.arena)
        await asyncio.sleep(0)

    async def write(self, error=None):
        answer = next(answer for answer in self.pool.answers if not answer.done())
        if error is None:
            answer.set_result(WaveWritten(0.5, True))
        else:
            answer.set_exception(error)
        for _ in range(4):
            await asyncio.sleep(0)

    def seal(self):
        self.generation.seals[0] = Seal(
            Sealed(9, "/runs/7", "d", 5, 2, 2 * PAGE, IMAGE_BYTES, b"o", 0, 0, 0, hashes=b"h", frame_hash=7), self.arena
        )

    def states(self):
        return [state for state, _ in self.arena.states()]


@pytest.fixture
def crew(tmp_path):
    crew = Crew(tmp_path)
    yield crew
    crew.journal.close()
    os.close(crew.arena.descriptor)


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_wave_is_written_from_its_slot_to_its_place_and_its_slot_given_back(crew):
    async def scenario():
        await crew.take(0, 1)
        [task] = crew.pool.tasks
        assert isinstance(task, WriteWaveTask)
        assert (task.wave_offset, task.nbytes, task.begin) == (PAGE + SLOT_BYTES + 2 * PAGE, PAGE, 0)
        assert (task.image_bytes, task.first, task.file) == (IMAGE_BYTES, True, "__0_0.distcp")
        assert task.directory == "/runs/.7.ckptd-save"
        assert crew.states()[1] is SlotState.PERSISTING
        await crew.write()
        assert crew.states()[1] is SlotState.FREE
        assert crew.sent == [SlotFreed(5, 1)]
        assert crew.progress == [1, PAGE]

    run(scenario)


def test_an_image_of_which_all_is_written_is_made_durable_with_the_clients_hashes(crew):
    async def scenario():
        for slot, begin in enumerate((0, PAGE, 2 * PAGE)):
            await crew.take(begin, slot)
        crew.seal()
        finishing = asyncio.create_task(crew.waves.finish(crew.generation, 0))
        for _ in range(3):
            await asyncio.sleep(0)
            assert not finishing.done()
            await crew.write()
        task = await finishing
        assert (task.hashes, task.frame_hash, task.object_bytes) == (b"h", 7, b"o")
        assert (task.write_s, task.direct, task.image_bytes) == (1.5, True, IMAGE_BYTES)

    run(scenario)


def test_a_seal_that_comes_without_some_waves_is_no_image(crew):
    """As a daemon that has just been started might find it in an arena."""

    async def scenario():
        crew.seal()
        with pytest.raises(UnexpectedError, match="no wave was heard"):
            await crew.waves.finish(crew.generation, 0)
        await crew.take(2 * PAGE, 2)
        with pytest.raises(WriteIncomplete) as caught:
            await crew.waves.finish(crew.generation, 0)
        assert (caught.value.planned_bytes, caught.value.written_bytes) == (IMAGE_BYTES, PAGE)
        await crew.write()

    run(scenario)


def test_a_failed_write_fails_the_rank_and_keeps_the_slot_until_the_save_has_ended(crew):
    async def scenario():
        await crew.take(0, 0)
        await crew.take(PAGE, 1)
        error = DiskFull("/runs", 10, 3)
        await crew.write(error)
        assert crew.failed == [(0, error)]
        assert crew.sent == []
        crew.waves.release(crew.generation)
        assert crew.sent == [SlotFreed(5, 0), SlotFreed(5, 1)]
        assert crew.states() == [SlotState.FREE] * 3

    run(scenario)


def test_a_wave_of_a_save_that_has_failed_is_not_written(crew):
    async def scenario():
        crew.generation.rules.handle(RankFell(0, DiskFull("/runs", 10, 3)))
        await crew.take(0, 2)
        assert crew.pool.tasks == []
        assert crew.sent == [SlotFreed(5, 2)]

    run(scenario)


def test_a_rank_that_is_gone_is_told_nothing(crew):
    async def scenario():
        await crew.take(0, 0)
        crew.sessions.clear()
        await crew.write()
        assert crew.sent == []
        assert crew.states()[0] is SlotState.FREE

    run(scenario)


def test_a_wave_that_lies_about_its_place_is_refused(crew):
    async def scenario():
        await crew.take(0, 0)
        with pytest.raises(BadMessage, match="overlaps"):
            await crew.take(0, 1, nbytes=2 * PAGE)
        await crew.write()

    run(scenario)


@pytest.mark.parametrize(
    "change",
    [{"arena": 6}, {"slot": 3}, {"begin": 100}, {"nbytes": 3 * PAGE}, {"begin": 3 * PAGE}, {"control_bytes": 8191}],
    ids=str,
)
def test_a_session_knows_a_wave_that_is_none_of_its_own(crew, change):
    fields = {"arena": 5, "slot": 0, "control_bytes": 2 * PAGE, "begin": 0, "nbytes": PAGE} | change
    wave = WaveSealed(9, "/runs/7", "d", image_bytes=IMAGE_BYTES, **fields)
    with pytest.raises(BadMessage):
        crew.session.check(wave)


class TestAfterARestart:
    """A daemon goes on with the waves that the one before it has taken."""

    def left(self, crew, *written):
        """Leave three waves, of which some are written, to a daemon that knows of none."""
        mine = RankWaves(WaveRing(IMAGE_BYTES), crew.arena)
        mine.left = [(Wave(page * PAGE, PAGE, page, 2 * PAGE), page in written) for page in range(3)]
        crew.generation.waves[0] = mine
        for page in range(3):
            crew.arena.set_state(page, SlotState.FREE if page in written else SlotState.PERSISTING, 9)

    def test_only_what_is_not_written_is_written(self, crew):
        async def scenario():
            self.left(crew, 0)
            crew.waves.go_on(crew.generation, 0)
            await asyncio.sleep(0)
            assert [(task.begin, task.first) for task in crew.pool.tasks] == [(PAGE, False), (2 * PAGE, False)]
            crew.seal()
            finishing = asyncio.create_task(crew.waves.finish(crew.generation, 0))
            await crew.write()
            await crew.write()
            assert (await finishing).image_bytes == IMAGE_BYTES
            assert crew.sent == [SlotFreed(5, 1), SlotFreed(5, 2)]  # slot 0 is the client's, and may be in use again

        run(scenario)

    def test_where_nothing_is_written_the_file_is_made_anew(self, crew):
        async def scenario():
            self.left(crew)
            crew.waves.go_on(crew.generation, 0)
            await asyncio.sleep(0)
            assert [(task.begin, task.first) for task in crew.pool.tasks] == [(0, True)]
            for _ in range(3):
                await crew.write()
            assert len(crew.pool.tasks) == 3

        run(scenario)

    def test_what_is_all_written_is_only_finished(self, crew):
        async def scenario():
            self.left(crew, 0, 1, 2)
            crew.waves.go_on(crew.generation, 0)
            crew.seal()
            assert (await crew.waves.finish(crew.generation, 0)).image_bytes == IMAGE_BYTES
            assert crew.pool.tasks == []

        run(scenario)

    def test_a_wave_is_in_the_journal_before_it_is_written_and_its_end_before_its_slot_is_free(self, crew):
        async def scenario():
            await crew.take(0, 1)
            assert [(record.begin, record.written) for record in crew.journal.read(WaveRecord)] == [(0, False)]
            await crew.take(0, 1)  # heard twice
            await crew.write()
            await crew.take(0, 1)
            assert [(record.begin, record.written) for record in crew.journal.read(WaveRecord)] == [(0, True)]

        run(scenario)
