"""Of several checkpoints the newest good one is loaded, the same on all ranks; what is passed over is named."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from support.managed import spoil, write_managed
from support.stock import save_stock

from ckptd.checkpoint.folder.locks import lock_for_removal
from ckptd.client import logging_handlers
from ckptd.client.loading import fallback
from ckptd.client.loading.fallback import Wanted, candidates_at, load_newest_good
from ckptd.client.loading.loader import load
from ckptd.client.loading.report import LoadReport
from ckptd.client.session.exchange import Patience, Place
from ckptd.protocol.errors import DiskFull, MissingKeys, NoGoodCheckpoint, RankFailed, UnknownCheckpoint, Unsupported

DAMAGE = ["bit", "missing", "truncated", "index", "no index"]


def target():
    return {"model": {"w": torch.full((4, 6), -1.0)}}


def names(paths):
    return [path.rpartition("/")[2] for path in paths]


@pytest.fixture
def three(tmp_path):
    for step in (8, 9, 10):
        write_managed(tmp_path, step, committed_s=100 - step)
    return tmp_path


class TestCandidates:
    def test_of_a_folder_are_in_it_the_newest_first(self, three):
        assert names(candidates_at(str(three))) == ["step-10", "step-9", "step-8"]

    def test_of_a_step_are_it_and_the_older_ones(self, three):
        assert names(candidates_at(str(three / "step-9"))) == ["step-9", "step-8"]

    @pytest.mark.parametrize("how", DAMAGE)
    def test_damaged_ones_are_among_them(self, three, how):
        spoil(three / "step-9", how)
        assert names(candidates_at(str(three))) == ["step-10", "step-9", "step-8"]

    def test_a_step_that_is_gone_is_followed_by_the_older_ones(self, three):
        assert names(candidates_at(str(three / "step-0009"))) == ["step-0009", "step-8"]

    def test_one_without_a_step_stands_alone(self, three):
        write_managed(three, 11, name="final")
        assert names(candidates_at(str(three / "final"))) == ["final"]
        assert names(candidates_at("/no/where")) == ["where"]

    def test_a_folder_whose_own_name_tells_a_step_is_a_folder(self, tmp_path):
        write_managed(tmp_path / "run-7", 3)
        write_managed(tmp_path, 2)
        assert names(candidates_at(str(tmp_path / "run-7"))) == ["step-3"]


class TestALoad:
    def test_of_good_ones_takes_the_newest_and_passes_over_nothing(self, three, caplog):
        report = load(target(), checkpoint_id=three, fallback=True, strict=False)
        assert names([report.path]) == ["step-10"]
        assert report.passed_over == ()
        assert caplog.records == []

    @pytest.mark.parametrize("how", DAMAGE)
    def test_passes_over_what_is_damaged_and_names_it(self, three, how, caplog):
        spoil(three / "step-10", how)
        state = target()
        report = load(state, checkpoint_id=three, fallback=True)
        assert names([report.path]) == ["step-9"]
        [passed] = report.passed_over
        assert names([passed.path]) == ["step-10"]
        assert passed.reason
        assert f"passed over {three}/step-10: {passed.reason}" in caplog.text
        assert not (state["model"]["w"] == -1).any()

    def test_tells_whoever_listens(self, three):
        spoil(three / "step-10", "bit")
        spoil(three / "step-9", "truncated")
        heard = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: heard.append((record.levelno, record.event))
        logging_handlers.add_handler("test", handler)
        try:
            load(target(), checkpoint_id=three, fallback=True)
        finally:
            logging_handlers.remove_handler("test")
        assert [level for level, _ in heard] == [logging.WARNING] * 2
        assert names([event.checkpoint_id for _, event in heard]) == ["step-10", "step-9"]
        assert [(event.operation, event.phase) for _, event in heard] == [("load", "fallback")] * 2
        assert "model.w" in str(heard[0][1].error)

    def test_leaves_no_trace_of_what_it_passed_over(self, three):
        spoil(three / "step-10", "bit", item="model.b")  # behind model.w, and not even wanted
        save_stock({"model.other": torch.ones(3)}, three / "step-9.tmp")
        for step in (8, 9):
            for file in (three / f"step-{step}").iterdir():
                file.unlink()
            (three / f"step-{step}").rmdir()
        (three / "step-9.tmp").rename(three / "step-9")
        state = target()
        report = load(state, checkpoint_id=three, fallback=True, strict=False)
        assert names([report.path]) == ["step-9"]
        assert (state["model"]["w"] == -1).all()

    def test_takes_stocks_as_well_and_checks_what_can_be_checked(self, tmp_path):
        for step in (1, 2):
            save_stock({"model": {"w": torch.full((4, 6), float(step))}}, tmp_path / str(step))
        spoil(tmp_path / "2", "bit")
        state = target()
        load(state, checkpoint_id=tmp_path, fallback=True)
        assert (state["model"]["w"] == 1).all()

    def test_of_damaged_ones_alone_touches_nothing_and_names_them(self, three):
        for step in (8, 9, 10):
            spoil(three / f"step-{step}")
        state = target()
        with pytest.raises(NoGoodCheckpoint, match=r"none of 3 .*step-10: .*model\.w.*step-9.*scrub"):
            load(state, checkpoint_id=three, fallback=True)
        assert (state["model"]["w"] == -1).all()

    def test_of_nothing_is_an_unknown_checkpoint(self, tmp_path):
        with pytest.raises(UnknownCheckpoint, match="nothing"):
            load(target(), checkpoint_id=tmp_path / "nothing", fallback=True)

    def test_that_does_not_fit_is_no_reason_to_go_on(self, three):
        with pytest.raises(MissingKeys):
            load({"model": {"w": torch.zeros(4, 6), "other": torch.zeros(2)}}, checkpoint_id=three, fallback=True)

    def test_without_fallback_wants_the_checkpoint_itself(self, three):
        with pytest.raises(UnknownCheckpoint):
            load(target(), checkpoint_id=three)

    def test_by_a_reader_of_the_users_own_cannot_fall_back(self, three):
        class Reader(dist.checkpoint.FileSystemReader):
            pass

        with pytest.raises(Unsupported, match="fallback"):
            load(target(), storage_reader=Reader(three), fallback=True)


def test_what_is_chosen_cannot_be_removed_before_it_is_loaded(three):
    seen = []

    def look(path):
        seen.extend([lock_for_removal(path), lock_for_removal(str(three / "step-9"))])
        return LoadReport(path=path, loaded=0)

    load_newest_good(Wanted(str(three), lambda: candidates_at(str(three))), look, place=Place())
    assert seen[0] is None
    assert seen[1] is not None


class TestRanks:
    """Some ranks, as threads, with a store of torch's own."""

    def run(self, root, size=3, *, candidates=None, fault=None, monkeypatch=None):
        store = dist.HashStore()
        patience = Patience(step_s=20.0, silence_s=20.0, beat_s=0.01)
        if fault is not None:
            real = fallback.verify_checkpoint

            def verify(path, *, share):
                fault(path, share)
                return real(path, share=share)

            monkeypatch.setattr(fallback, "verify_checkpoint", verify)

        def one(rank):
            wanted = Wanted(str(root), candidates(rank) if candidates else lambda: candidates_at(str(root)))
            place = Place(rank, size, store, "ckptd/test")
            try:
                return load_newest_good(
                    wanted, lambda path: LoadReport(path=path, loaded=rank), place=place, patience=patience
                )
            except BaseException as error:  # noqa: BLE001  # the test looks at it
                return error

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(one, range(size)))

    @pytest.mark.parametrize("how", DAMAGE)
    def test_all_take_the_same_though_one_alone_reads_the_damaged_part(self, three, how):
        spoil(three / "step-10", how)
        reports = self.run(three)
        assert names([report.path for report in reports]) == ["step-9"] * 3
        assert len({report.passed_over for report in reports}) == 1

    def test_one_rank_alone_sees_damage_and_all_pass_over(self, three, monkeypatch):
        def fault(path, share):
            if path.endswith("step-10") and share == (2, 3):
                raise UnknownCheckpoint(path)

        reports = self.run(three, fault=fault, monkeypatch=monkeypatch)
        assert names([report.path for report in reports]) == ["step-9"] * 3
        assert "no checkpoint at" in reports[0].passed_over[0].reason

    def test_only_rank_0_lists(self, three):
        def candidates(rank):
            return (lambda: candidates_at(str(three))) if rank == 0 else pytest.fail

        assert names([report.path for report in self.run(three, candidates=candidates)]) == ["step-10"] * 3

    def test_what_is_no_damage_fails_all_alike(self, three, monkeypatch):
        def fault(path, share):
            if share == (1, 3):
                raise DiskFull(path, 1, 0)

        errors = self.run(three, fault=fault, monkeypatch=monkeypatch)
        assert {type(error) for error in errors} == {RankFailed}
        assert {str(error) for error in errors} == {str(errors[0])}

    def test_all_damaged_is_told_to_all(self, three):
        for step in (8, 9, 10):
            spoil(three / f"step-{step}")
        assert [type(error) for error in self.run(three)] == [NoGoodCheckpoint] * 3
