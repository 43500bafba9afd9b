"""Arguments that ckptd cannot honour are refused in one line, before anybody is spoken to."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.staging import (
    AsyncStager,
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
)

from ckptd import client
from ckptd.client.saving.waves import WAVE_SLOT_BYTES
from ckptd.client.session import sessions
from ckptd.client.session.options import SaveRequest, SessionOptions
from ckptd.protocol.errors import Unsupported

STATE = {"w": torch.ones(2)}


class Contacted(AssertionError):
    """A session was opened."""


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """Whoever opens a session has failed the test."""

    def open_session(*_):
        raise Contacted

    monkeypatch.setattr(sessions, "Session", open_session)
    monkeypatch.setattr(sessions, "_sessions", {})
    monkeypatch.setattr(sessions, "_policies", {})


def refused(call, *arguments, **options) -> str:
    with pytest.raises(Unsupported) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD_OPTIONS = [
    {"on_busy": "explode"},
    {"staging": "sometimes"},
    {"slots": 0},
    {"slots": 129},
    {"slot_bytes": 4095},
    {"slot_bytes": 0},
    {"connect_timeout_s": 0},
    {"busy_timeout_s": -1.0},
    {"progress_timeout_s": 86_401.0},
    {"progress_timeout_s": float("nan")},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_a_session_cannot_be_opened_with(options):
    [(name, value)] = options.items()
    assert f"{name}={value!r}" in refused(SessionOptions, **options)
    assert f"{name}={value!r}" in refused(client.connect, STATE, **options)


def test_options_at_their_bounds_are_taken():
    SessionOptions(slots=1, slot_bytes=4096, connect_timeout_s=0.001, busy_timeout_s=86_400)
    SessionOptions(slots=128, on_busy="skip", staging="background")


def test_waves_have_slots_of_a_fixed_size_from_the_start():
    assert SessionOptions(staging="waves").slot_bytes == WAVE_SLOT_BYTES
    assert SessionOptions(staging="waves", slot_bytes=8192).slot_bytes == 8192
    assert SessionOptions().slot_bytes is None


class TestConnect:
    @pytest.mark.parametrize("options", [{"rank": 0}, {"world_size": 2}, {"rank": 1, "job": "j"}], ids=str)
    def test_rank_and_world_size_go_together(self, options):
        assert "rank without world_size" in refused(client.connect, **options)

    def test_a_job_of_several_ranks_needs_a_name(self):
        assert "without a name" in refused(client.connect, rank=0, world_size=2)

    @pytest.mark.parametrize("options", [{"rank": 0, "world_size": 1}, {"rank": 1, "world_size": 2, "job": "j"}, {}])
    def test_what_is_complete_is_carried_out(self, options):
        with pytest.raises(Contacted):
            client.connect(**options)


class OtherWriter(dcp.FileSystemWriter):
    pass


class OtherSavePlanner(dcp.DefaultSavePlanner):
    pass


def writer(**options) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter("/runs/7", **options)


BAD_SAVES = {
    "no id": ({}, "a call without an id"),
    "an empty id": ({"checkpoint_id": ""}, "checkpoint id ''"),
    "an odd id": ({"checkpoint_id": "/a\0b"}, "checkpoint id '/a\\x00b'"),
    "a reader": ({"storage_writer": dcp.FileSystemReader("/runs/7")}, "storage_writer FileSystemReader"),
    "a planner for loading": ({"checkpoint_id": "/runs/7", "planner": dcp.DefaultLoadPlanner()}, "DefaultLoadPlanner"),
}


@pytest.mark.parametrize("save", [client.save, client.async_save], ids=["save", "async_save"])
@pytest.mark.parametrize(("options", "told"), BAD_SAVES.values(), ids=BAD_SAVES)
def test_a_save_is_refused_for(save, options, told):
    assert told in refused(save, STATE, **options)


BAD_LOADS = {
    "no id": ({}, "a call without an id"),
    "a URL": ({"checkpoint_id": "gs://bucket/step-7"}, "gs://bucket/step-7"),
    "a planner for saving": ({"checkpoint_id": "/runs/7", "planner": OtherSavePlanner()}, "planner OtherSavePlanner"),
    "a writer": ({"storage_reader": writer()}, "storage_reader FileSystemWriter"),
}


@pytest.mark.parametrize(("options", "told"), BAD_LOADS.values(), ids=BAD_LOADS)
def test_a_load_is_refused_for(options, told):
    assert told in refused(client.load, STATE, **options)


class Taken:
    """A session that keeps what it is asked for."""

    live = True

    def __init__(self, staging: str = "blocking") -> None:
        self.options = SessionOptions(staging=staging)
        self.request: SaveRequest | None = None

    def save(self, state_dict, request: SaveRequest) -> Taken:
        self.state_dict, self.request = state_dict, request
        return self

    def result(self):
        return "metadata"

    def add_done_callback(self, _):
        """It never ends."""


@pytest.fixture
def taken(monkeypatch):
    session = Taken()
    monkeypatch.setattr(sessions, "_sessions", {"default": session})
    return session


class TestHandOvers:
    """What the daemon cannot do itself goes to a worker, with whatever shall do it."""

    @pytest.mark.parametrize(
        "options",
        [
            {"storage_writer": OtherWriter("/runs/7")},
            {"checkpoint_id": "/runs/7", "planner": OtherSavePlanner()},
            {"checkpoint_id": "/runs/x/../7", "planner": OtherSavePlanner()},
        ],
    )
    def test_a_planner_or_writer_of_the_users_own_is_handed_over(self, taken, options):
        client.save(STATE, **options)
        handed_over = taken.request.hand_over
        assert handed_over.writer is options.get("storage_writer", handed_over.writer)
        assert handed_over.planner is options.get("planner", handed_over.planner)
        assert taken.request.checkpoint_id == "/runs/7"

    @pytest.mark.parametrize(
        "options",
        [
            {"single_file_per_rank": False},
            {"serialization_format": SerializationFormat.SAFETENSORS},
            {"_extensions": [ZStandard()]},
        ],
        ids=["many files", "another format", "an extension"],
    )
    @pytest.mark.parametrize("kind", [dcp.FileSystemWriter, client.FileSystemWriter], ids=["stock's", "ours"])
    def test_another_form_of_files_is_written_by_our_own_writer(self, taken, kind, options):
        client.save(STATE, storage_writer=kind("/runs/7", **options))
        handed_over = taken.request.hand_over.writer
        assert type(handed_over) is client.FileSystemWriter
        assert handed_over.single_file_per_rank == options.get("single_file_per_rank", True)
        assert len(handed_over.extensions) == len(options.get("_extensions", []))

    def test_the_daemons_own_way_needs_no_hand_over(self, taken):
        client.save(STATE, storage_writer=writer(), planner=dcp.DefaultSavePlanner())
        assert taken.request.hand_over is None

    def test_an_object_stores_id_is_kept_as_it_is(self, taken):
        client.save(STATE, checkpoint_id="s3://bucket/a//b")
        assert taken.request.checkpoint_id == taken.request.hand_over.checkpoint_id == "s3://bucket/a//b"

    @pytest.mark.parametrize(
        "options", [{"checkpoint_id": "memory://a"}, {"storage_writer": client.FsspecWriter("memory://a")}]
    )
    def test_memory_of_one_process_is_no_place_for_another_process_to_write(self, options):
        assert "memory of one process" in refused(client.save, STATE, **options)


class CastingStager(AsyncStager):
    """A user's own: casts, and counts what it is asked."""

    def __init__(self, *, later: bool = False) -> None:
        self.later, self.synchronized = later, 0

    def stage(self, state_dict):
        staged = {key: value.half() for key, value in state_dict.items()}
        if not self.later:
            return staged
        future = Future()
        future.set_result(staged)
        return future

    @property
    def should_synchronize_after_execute(self) -> bool:
        return not self.later

    def synchronize_staging(self) -> None:
        self.synchronized += 1


@pytest.mark.parametrize("later", [True, False])
def test_a_users_stager_stages_first(taken, later):
    stager = CastingStager(later=later)
    client.async_save({"w": torch.ones(2)}, checkpoint_id="/runs/7", async_stager=stager)
    assert taken.state_dict["w"].dtype == torch.float16
    assert stager.synchronized == (not later)


class TestWhatIsTaken:
    @pytest.mark.parametrize(
        "where",
        [
            {"checkpoint_id": "/runs/7"},
            {"checkpoint_id": Path("/runs/7")},
            {"checkpoint_id": "/runs/x/../7/"},
            {"storage_writer": writer()},
            {"storage_writer": dcp.FileSystemWriter("/elsewhere"), "checkpoint_id": "/runs/7"},
        ],
        ids=["text", "a path", "a detour", "a writer", "a writer and an id"],
    )
    def test_an_id_is_an_absolute_path(self, taken, where):
        assert client.save(STATE, **where) == "metadata"
        assert taken.request.checkpoint_id == "/runs/7"

    def test_a_relative_id_is_one_of_the_working_directory(self, taken, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        client.async_save(STATE, checkpoint_id="step-7")
        assert taken.request.checkpoint_id == os.path.join(tmp_path, "step-7")

    @pytest.mark.parametrize(
        ("overwrite", "options"), [(True, {}), (True, {"overwrite": True}), (False, {"overwrite": False})]
    )
    def test_a_writer_may_forbid_to_overwrite(self, taken, overwrite, options):
        client.save(STATE, storage_writer=writer(**options))
        assert taken.request.overwrite is overwrite

    def test_planners_settings_change_the_plan(self, taken):
        seen = set()
        for flatten in (True, False):
            for lowest in (True, False):
                planner = dcp.DefaultSavePlanner(flatten_state_dict=flatten, dedup_save_to_lowest_rank=lowest)
                client.save(STATE, checkpoint_id="/runs/7", planner=planner)
                assert taken.request.flat is not flatten
                seen.add(taken.request.settings)
        assert len(seen) == 4

    def test_a_plain_save_is_one_of_the_default_planner(self, taken):
        client.save(STATE, checkpoint_id="/runs/7")
        plain = taken.request.settings
        client.save(STATE, checkpoint_id="/runs/7", planner=dcp.DefaultSavePlanner())
        assert taken.request.settings == plain

    @pytest.mark.parametrize(
        ("session", "stager", "background"),
        [
            ("blocking", None, False),
            ("background", None, True),
            ("blocking", BlockingAsyncStager(), False),
            ("background", BlockingAsyncStager(), True),
        ],
    )
    def test_a_save_stages_in_the_background_where_that_is_asked_for(self, monkeypatch, session, stager, background):
        taken = Taken(session)
        monkeypatch.setattr(sessions, "_sessions", {"default": taken})
        client.async_save(STATE, checkpoint_id="/runs/7", async_stager=stager)
        assert taken.request.background is background
        client.save(STATE, checkpoint_id="/runs/7")
        assert taken.request.background is False

    @pytest.mark.parametrize("in_background", [True, False])
    def test_torchs_default_stager_says_how_it_stages(self, taken, in_background):
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=in_background,
            use_non_blocking_copy=False,
        )
        stager = DefaultStager.__new__(DefaultStager)  # its __init__ wants a GPU, or starts threads
        stager._config = options
        client.async_save(STATE, checkpoint_id="/runs/7", async_stager=stager)
        assert taken.request.background is in_background
