"""An error that passes costs a save some time and nothing else; one that stays fails it."""

from __future__ import annotations

import errno

import pytest
from support.clients import assert_holds
from support.flaky import failures, flaky
from support.nursery import state

from ckptd.protocol.errors import CkptdError


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_image_is_written_again(start_daemon, client, tmp_path, number):
    (tmp_path / "marks").mkdir()
    daemon = start_daemon(environment=flaky(tmp_path / "marks", number, times=2), write_retry_s=0.01)
    client.save(state(), checkpoint_id=tmp_path / "a")
    assert failures(tmp_path / "marks") == 2
    assert daemon.metric("ckptd_write_retries_total") == 2
    assert daemon.metric('ckptd_saves_total{outcome="committed"}') == 1
    assert daemon.metric("ckptd_worker_restarts_total") == 0
    assert_holds(tmp_path / "a")


@pytest.mark.parametrize(("number", "attempts"), [(errno.EIO, 3), (errno.ENOSPC, 1), (errno.EACCES, 1)])
def test_what_stays_fails_the_save_and_leaves_nothing(start_daemon, client, tmp_path, number, attempts):
    (tmp_path / "marks").mkdir()
    environment = flaky(tmp_path / "marks", number, times=attempts)
    daemon = start_daemon(environment=environment, write_retry_s=0.01, write_attempts=3)
    with pytest.raises(CkptdError, match="pwrite"):
        client.save(state(), checkpoint_id=tmp_path / "a")
    assert failures(tmp_path / "marks") == attempts
    assert daemon.metric("ckptd_write_retries_total") == attempts - 1
    daemon.wait_for_save(tmp_path / "a", lambda save: save["state"] == "failed")
    client.save(state(), checkpoint_id=tmp_path / "a")
    assert_holds(tmp_path / "a")
