"""Arguments that ckptd cannot honour are refused in one line, before anybody is spoken to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.staging import (
    AsyncStager,
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
)

from ckptd import client
from ckptd.client import sessions
from ckptd.client.session import SaveRequest, SessionOptions
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


class OtherLoadPlanner(dcp.DefaultLoadPlanner):
    pass


class OtherStager(AsyncStager):
    pass


def writer(**options) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter("/runs/7", **options)


BAD_SAVES = {
    "no id": ({}, "a call without an id"),
    "an empty id": ({"checkpoint_id": ""}, "checkpoint id ''"),
    "a URL": ({"checkpoint_id": "s3://bucket/step-7"}, "checkpoint id 's3://bucket/step-7'"),
    "an odd id": ({"checkpoint_id": "/a\0b"}, "checkpoint id '/a\\x00b'"),
    "another writer": ({"storage_writer": OtherWriter("/runs/7")}, "storage_writer OtherWriter"),
    "a writer of many files": ({"storage_writer": writer(single_file_per_rank=False)}, "single_file_per_rank=False"),
    "a writer of another format": (
        {"storage_writer": writer(serialization_format=SerializationFormat.SAFETENSORS)},
        "SAFETENSORS",
    ),
    "another planner": ({"checkpoint_id": "/runs/7", "planner": OtherSavePlanner()}, "planner OtherSavePlanner"),
    "a planner for loading": ({"checkpoint_id": "/runs/7", "planner": dcp.DefaultLoadPlanner()}, "DefaultLoadPlanner"),
    "no collectives": ({"checkpoint_id": "/runs/7", "use_collectives": False}, "use_collectives=False"),
}


@pytest.mark.parametrize("save", [client.save, client.async_save], ids=["save", "async_save"])
@pytest.mark.parametrize(("options", "told"), BAD_SAVES.values(), ids=BAD_SAVES)
def test_a_save_is_refused_for(save, options, told):
    assert told in refused(save, STATE, **options)


def test_a_writer_with_extensions_is_refused():
    with_extensions = writer()
    with_extensions.transforms.extensions = ["compress"]
    assert "_extensions" in refused(client.save, STATE, storage_writer=with_extensions)


def test_a_stager_that_is_not_torchs_is_refused():
    assert "async_stager OtherStager" in refused(
        client.async_save, STATE, checkpoint_id="/runs/7", async_stager=OtherStager()
    )


BAD_LOADS = {
    "no id": ({}, "a call without an id"),
    "a URL": ({"checkpoint_id": "gs://bucket/step-7"}, "gs://bucket/step-7"),
    "another planner": ({"checkpoint_id": "/runs/7", "planner": OtherLoadPlanner()}, "planner OtherLoadPlanner"),
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
        self.request = request
        return self

    def result(self):
        return "metadata"


@pytest.fixture
def taken(monkeypatch):
    session = Taken()
    monkeypatch.setattr(sessions, "_sessions", {"default": session})
    return session


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
        ids=str,
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
