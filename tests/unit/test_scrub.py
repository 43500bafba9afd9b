"""Every checkpoint below a folder is read and judged; what is unfinished is reported alone."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from support.managed import spoil, write_managed
from support.stock import save_stock

from ckptd.checkpoint.folder import scrub as scrub_module
from ckptd.checkpoint.folder.scrub import scrub
from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.daemon.cli import app
from ckptd.protocol.errors import WrongBits


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 8
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path):
    """Two of ours in a folder of their own, and one of stock's."""
    for step in (1, 2):
        write_managed(tmp_path / "ours", step)
    save_stock({"w": torch.arange(1000.0), "n": 7}, tmp_path / "stock")
    return tmp_path


def states(folder):
    return {one.path.removeprefix(f"{folder}/"): one.state for one in scrub(str(folder))}


def test_all_are_found_ours_and_stocks(folder):
    assert states(folder) == {"ours/step-1": "good", "ours/step-2": "good", "stock": "good"}
    assert states(folder / "stock") == {f"{folder}/stock".removeprefix(f"{folder}/stock/"): "good"}


def test_one_that_is_damaged_does_not_hide_the_others(folder):
    spoil(folder / "ours" / "step-1")
    (folder / "ours" / "step-2" / ".ckptd").write_bytes(b"nonsense")
    found = {one.path.rpartition("/")[2]: one for one in scrub(str(folder))}
    assert isinstance(found["step-1"].faults[0], WrongBits)
    assert [found[name].state for name in ("step-1", "step-2", "stock")] == ["damaged", "damaged", "good"]


def test_unfinished_saves_are_reported_and_not_judged(folder):
    shutil.copytree(folder / "stock", folder / ".step-3.ckptd-my_job-1-2-0a1b2c3d")
    shutil.copytree(folder / "stock", folder / "ours" / "step-9")
    (folder / "ours" / "step-9" / ".metadata").unlink()
    shutil.copytree(folder / "stock", folder / ".step-3.ckptd-removed-0a1b2c3d")
    found = states(folder)
    assert found[".step-3.ckptd-my_job-1-2-0a1b2c3d"] == found["ours/step-9"] == "unfinished"
    assert len(found) == 5


def test_one_that_is_removed_meanwhile_is_not_judged(folder, monkeypatch):
    real = verify_checkpoint

    def verify(path, **options):
        if path.endswith("step-1"):
            shutil.rmtree(path)
        return real(path, **options)

    monkeypatch.setattr(scrub_module, "verify_checkpoint", verify)
    assert states(folder)["ours/step-1"] == "gone"


def test_progress_is_over_all_of_them(folder):
    news = []
    list(scrub(str(folder), progress=lambda done, total: news.append((done, total))))
    assert news == sorted(news)
    assert len({total for _, total in news}) == 1
    assert all(done <= total for done, total in news)
    assert news[-1][0] > 0.8 * news[-1][1]


class TestStocksRecords:
    def test_have_crcs_that_are_checked(self, tmp_path):
        save_stock({"w": torch.arange(1000.0), "n": 7}, tmp_path / "a")
        report = verify_checkpoint(str(tmp_path / "a"))
        assert (report.good, report.hashes_checked) == (True, False)
        assert report.crcs_checked >= 4

    @pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9])
    def test_a_wrong_bit_is_found_and_named(self, tmp_path, part):
        save_stock({"w": torch.arange(100_000.0)}, tmp_path / "a")
        index = read_index(str(tmp_path / "a"))
        begin, nbytes = int(index.record_offset[0]), int(index.record_bytes[0])
        flip(tmp_path / "a" / "__0_0.distcp", begin + 2048 + int((nbytes - 4096) * part))
        [fault] = verify_checkpoint(str(tmp_path / "a")).faults
        assert isinstance(fault, WrongBits)
        assert (fault.item, fault.offset) == ("w", begin)

    def test_a_directory_of_the_archive_that_is_spoilt_is_found(self, tmp_path):
        save_stock({"w": torch.arange(1000.0)}, tmp_path / "a")
        index = read_index(str(tmp_path / "a"))
        end = int(index.record_offset[0] + index.record_bytes[0])
        for at in range(end - 22, end - 18):  # the signature of its last record
            flip(tmp_path / "a" / "__0_0.distcp", at)
        assert [type(fault) for fault in verify_checkpoint(str(tmp_path / "a")).faults] == [WrongBits]

    def test_without_crcs_nothing_is_compared_and_nothing_is_wrong(self, tmp_path):
        torch.serialization.set_crc32_options(False)
        try:
            save_stock({"w": torch.arange(1000.0)}, tmp_path / "a")
        finally:
            torch.serialization.set_crc32_options(True)
        report = verify_checkpoint(str(tmp_path / "a"))
        assert report.good
        assert report.crcs_checked == 0


def test_shares_cover_all_and_do_not_repeat(folder, monkeypatch):
    from ckptd.checkpoint import verify

    monkeypatch.setattr(verify, "READ_BYTES", 300)
    path = folder / "ours" / "step-1"
    index = read_index(str(path))
    for item in range(len(index.item_name)):
        if not index.data_bytes[item]:
            continue
        file = path / index.files[index.item_file[item]]
        flip(file, int(index.data_offset[item]))
        found = [len(verify_checkpoint(str(path), share=(part, 3)).faults) for part in range(3)]
        assert sorted(found) == [0, 0, 1]
        flip(file, int(index.data_offset[item]))
    flip(path / "__1_0.distcp", 1)  # of no item
    assert sorted(len(verify_checkpoint(str(path), share=(part, 3)).faults) for part in range(3)) == [0, 0, 1]


class TestTheCommand:
    def run(self, capsys, *arguments):
        with pytest.raises(SystemExit) as ended:
            app.app(["scrub", *map(str, arguments)], prog_name="ckptd")
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    def test_all_good_is_0(self, folder, capsys):
        code, out, err = self.run(capsys, folder)
        assert (code, err) == (0, "")
        assert "3 good" in out.splitlines()[-1]
        assert "CRCs checked" in out

    def test_something_that_is_not_good_is_1_and_named(self, folder, capsys):
        spoil(folder / "ours" / "step-1")
        code, out, err = self.run(capsys, folder)
        assert code == 1
        assert "1 damaged, 2 good" in out
        assert "step-1/__0_0.distcp" in err

    def test_json_tells_all(self, folder, capsys):
        (folder / "ours" / "step-2" / "__1_0.distcp").unlink()
        code, out, _ = self.run(capsys, folder, "--json")
        facts = json.loads(out)
        assert (code, facts["good"]) == (1, False)
        by_name = {one["path"].rpartition("/")[2]: one for one in facts["checkpoints"]}
        assert {name: one["state"] for name, one in by_name.items()} == {
            "step-1": "good",
            "step-2": "damaged",
            "stock": "good",
        }
        assert by_name["step-2"]["faults"][0]["code"] == "missing_file"

    def test_a_bar_is_drawn_where_somebody_looks(self, folder, capsys, monkeypatch):
        monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
        monkeypatch.setenv("TERM", "xterm")
        code, out, err = self.run(capsys, folder)
        assert code == 0
        assert "3 good" in out
        assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in err

    @pytest.mark.parametrize("arguments", [(), ("/x", "--threads", "0"), ("/x", "--no-such"), ("/x", "/y")])
    def test_wrong_usage_is_2(self, capsys, arguments):
        assert self.run(capsys, *arguments)[0] == 2

    def test_an_empty_folder_is_good_and_says_so(self, tmp_path, capsys):
        assert self.run(capsys, tmp_path)[:2] == (0, f"{tmp_path}: no checkpoints\n")
