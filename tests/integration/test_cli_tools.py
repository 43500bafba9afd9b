"""The offline commands as processes: quick, small, and harmless when they are killed or fed damage."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.stock import load_stock, save_stock

from ckptd.checkpoint.verify import verify_checkpoint

TESTS = Path(__file__).parents[1]
COMMAND = [sys.executable, str(TESTS / "support" / "measured_cli.py")]
TENSOR_BYTES, TENSORS = 24 << 20, 6


def measured(*arguments, code=0):
    """Run ``ckptd``; return its stdout, the lines of its stderr, and what it took. ``code`` None: any exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd="/", check=False)
    assert code is None or done.returncode == code, done.stderr
    *lines, facts = done.stderr.splitlines()
    return done.stdout, lines, json.loads(facts)


class TestLs:
    @pytest.fixture
    def folder(self, tmp_path):
        state = {f"layers.{number}.weight": torch.ones(4, 4) for number in range(1000)}
        save_stock({**state, "step": 3}, tmp_path / "stock")
        measured("convert", tmp_path / "stock", tmp_path / "ours")
        return tmp_path

    @pytest.mark.parametrize("path", ["stock", "ours", "."])
    def test_takes_a_fraction_of_a_second_and_no_torch(self, folder, path):
        runs = [measured("ls", folder / path) for _ in range(5)]
        assert all("ckptd" in out for out, _, _ in runs) or path == "stock"
        assert {tuple(facts["loaded"]) for _, _, facts in runs} == {("numpy",)}
        # Processor time, the least of several: a loaded machine stretches the clock on the wall.
        assert min(facts["cpu_s"] for _, _, facts in runs) < 0.3

    @pytest.mark.parametrize("arguments", [("inspect", "stock", "layers.0.weight"), ("diff", "stock", "ours")])
    def test_neither_do_the_others_that_need_none(self, folder, arguments):
        command, *paths = arguments
        absolute = [folder / path if (folder / path).exists() else path for path in paths]
        _, _, facts = measured(command, *absolute)
        assert "torch" not in facts["loaded"]

    @pytest.mark.parametrize("arguments", [("ls", "stock"), ("ls", "--json", "stock"), ("inspect", "stock", "--json")])
    def test_a_reader_that_has_seen_enough_is_no_error(self, folder, arguments):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-c", "from ckptd.daemon.cli import main; main()", *arguments]
        try:
            done = subprocess.run(
                command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, cwd=folder, check=False
            )
        finally:
            os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Six tensors of 24 MiB, one of them in columns; and the same, small, for what a process takes without tensors."""
    folder = tmp_path_factory.mktemp("large")
    for name, size in (("large", TENSOR_BYTES // 4 // 1024), ("small", 8)):
        state = {f"t{number}": torch.full((size, 1024), float(number)) for number in range(TENSORS)}
        columns = [((0, 0), (size, 100)), ((0, 100), (size, 924))]
        save_stock(state, folder / name, boxes={"t1": columns}, files=2)
    return folder


def added_memory(folder, form, *, to, suffix=""):
    """Return by how much more memory a conversion of the large checkpoint takes than one of the small."""
    peaks = {}
    for name in ("small", "large"):
        source, target = folder / f"{name}{form}", folder / f"{name}-{to}{suffix}"
        _, _, facts = measured("convert", source, target)
        peaks[name] = facts["peak_bytes"]
    return peaks["large"] - peaks["small"]


def test_each_direction_takes_one_tensor_of_memory_at_most(large):
    """In one test, because each step needs the one before it."""
    steps = [("", "ours", ""), ("", "a", ".pt"), ("", "b", ".safetensors")]
    steps += [("-a.pt", "from_pt", ""), ("-b.safetensors", "from_st", ""), ("-a.pt", "c", ".safetensors")]
    added = {(form, to): added_memory(large, form, to=to, suffix=suffix) for form, to, suffix in steps}
    assert max(added.values()) < TENSOR_BYTES + (48 << 20) <= TENSORS * TENSOR_BYTES / 2
    wanted = load_stock(large / "large")
    for name in ("large-ours", "large-from_pt", "large-from_st"):
        assert verify_checkpoint(str(large / name)).good
    assert all(torch.equal(torch.load(large / "large-a.pt", mmap=True)[key], value) for key, value in wanted.items())
    _, _, facts = measured("diff", large / "large-c.safetensors", large / "large")
    assert facts["peak_bytes"] < (TENSOR_BYTES + (160 << 20))


@pytest.mark.parametrize("target", ["out", "out.pt", "out.safetensors"])
def test_a_conversion_that_is_killed_leaves_no_output(large, tmp_path, target):
    path = tmp_path / target
    process = subprocess.Popen([*COMMAND, "convert", str(large / "large"), str(path)], cwd="/")
    try:
        while not list(tmp_path.iterdir()):  # until it has begun to write
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(60)
    assert not path.exists()
    assert [entry.name[0] for entry in tmp_path.iterdir()] == ["."]  # hidden, where no reader looks
    out, _, _ = measured("ls", tmp_path, code=None)  # 1 where not even the first file was begun
    assert "complete" not in out
    measured("convert", large / "small", path)
    assert path.exists()


HOSTILE = b"\x80\x02cposix\nsystem\nX\x10\0\0\0touch /tmp/pwned!\x85R."


@pytest.mark.parametrize("command", [("ls",), ("inspect",), ("diff",), ("extract",), ("convert",)])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        (".metadata", HOSTILE),
        (".metadata", b""),
        (".metadata", b"\x80\x02]q"),
        (".ckptd", b"garbage of a few bytes"),
    ],
)
def test_a_spoilt_index_is_one_line(tmp_path, command, file, content):
    save_stock({"w": torch.ones(3), "step": 1}, tmp_path / "a")
    (tmp_path / "a" / file).write_bytes(content)
    rest = {
        **{"diff": [tmp_path / "a"], "extract": ["w", "-o", tmp_path / "x.pt"], "convert": [tmp_path / "b"]},
        **{"ls": [], "inspect": []},
    }
    out, lines, _ = measured(*command, tmp_path / "a", *rest[command[0]], code=1)
    assert out == ""
    (line,) = lines
    assert line.startswith(f"ckptd: {tmp_path}/a/{file}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not os.path.exists("/tmp/pwned!")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "is missing though the index names it"),
        (lambda path: os.truncate(path, 2000), "bytes, the index needs"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cannot be read"),
    ],
)
@pytest.mark.parametrize("command", ["diff", "extract", "convert"])
def test_spoilt_values_are_one_line(tmp_path, command, spoil, reason):
    save_stock({"w": torch.ones(3000), "step": 1}, tmp_path / "a")
    save_stock({"w": torch.ones(3000), "step": 1}, tmp_path / "b")
    spoil(tmp_path / "a" / "__0_0.distcp")
    rest = {"diff": [tmp_path / "b"], "extract": ["w", "-o", tmp_path / "x.npy"], "convert": [tmp_path / "c"]}
    _, (line,), _ = measured(command, tmp_path / "a", *rest[command], code=1)
    assert line.startswith("ckptd: ")
    assert reason in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
