"""`--gpus`: several processes of one command, how they end, and what is refused."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest

from defeat_cli.engine import distributed, launching
from defeat_cli.engine.launching import WELL, check_count, launch, threads_each
from defeat_cli.errors import Ended, RunError


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of some lines, and its name; `rank` and `world` are known there."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(lines):
        known = "import os, signal, sys, time\nrank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n"
        (tmp_path / "worker_of_a_test.py").write_text(known + lines)
        return "worker_of_a_test"

    return make


@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        ("assert world == 2 and sys.argv[1:] == ['a', 'b']", 0, ""),
        ("if rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", 1, r"process 1 of 2 (pid "),
        ("if rank: sys.exit(2)\ntime.sleep(60)", 2, "ended with exit code 2"),
        ("sys.exit(143)", 143, ""),
    ],
)
def test_processes_end_together_and_it_is_said_which_and_why(module, monkeypatch, capfd, lines, code, message):
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.5)
    began = time.monotonic()
    assert launch(2, [module(lines), "a", "b"]) == code
    assert time.monotonic() - began < 20
    said = capfd.readouterr().err
    assert message in said
    assert said.count("error:") == (code in (1, 2))


def test_signals_go_on_and_are_no_failure(module, monkeypatch, capfd, tmp_path):
    lines = f"""
def stop(*_):
    (open({str(tmp_path)!r} + f"/saved-{{rank}}", "w")).close()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if rank == 0:
    while not os.path.exists({str(tmp_path)!r} + "/ready"): time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
else:
    (open({str(tmp_path)!r} + "/ready", "w")).close()
time.sleep(60)
"""
    assert launch(2, [module(lines)]) == 143
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert capfd.readouterr().err == ""
    assert 143 in WELL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_process_that_a_signal_ends_which_was_passed_on_is_no_failure(module, capfd):
    lines = "if rank == 0: os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    assert launch(2, [module(lines)]) == 143
    assert capfd.readouterr().err == ""


def test_the_command_starts_itself_once_a_gpu(defeat, tiny, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(launching, "launch", lambda *call: started.append(call) or 2)
    arguments = ["train", "-r", str(tiny), "-o", str(tmp_path / "run"), "--device", "cpu"]
    defeat(*arguments, "--gpus", 3, "--seed", 4, code=2)
    defeat(*arguments, "--gpus=3", code=2)
    assert started == [(3, ["defeat_cli", *arguments, "--seed", "4"]), (3, ["defeat_cli", *arguments])]
    assert "0 CUDA devices" in defeat(*arguments[:-2], "--gpus", 2, "--set", "run.device=auto", code=2)
    assert "unknown key" in defeat(*arguments, "--gpus", 3, "--set", "run.gpus=1", code=2)
    assert len(started) == 2


@pytest.mark.parametrize(
    ("count", "device", "found", "message"),
    [
        (0, "cpu", 0, "give 1 or more"),
        (2, "auto", 0, "this machine has 0 CUDA devices; with --device cpu it is 2 processes on the CPU"),
        (4, "cuda", 2, "this machine has 2 CUDA devices"),
        (2, "cuda:1", 4, "names one GPU"),
        (1, "auto", 0, None),
        (2, "cpu", 0, None),
        (4, "cuda", 4, None),
    ],
)
def test_more_processes_than_gpus_are_refused_unless_the_cpu_is_asked_for(monkeypatch, count, device, found, message):
    monkeypatch.setattr(launching.torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: found)
    if message is None:
        check_count(count, device)
    else:
        with pytest.raises(RunError, match=message):
            check_count(count, device)


def test_several_processes_start_no_more_of_them(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="torchrun has started several processes already"):
        check_count(2, "cpu")


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert [threads_each(count) for count in (1, 3, 20)] == [{}, {"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "1"}]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_each(3) == {}


@pytest.mark.parametrize(("local_rank", "error"), [("0", RunError), ("1", Ended)])
def test_a_process_whose_launcher_is_gone_before_it_is_found_ends(monkeypatch, local_rank, error):
    """One process of the machine says so, the others end with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (given | {"MASTER_PORT": str(port), distributed.SERVED_BY_LAUNCHER: "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "CONNECTING", timedelta(seconds=1))
    with pytest.raises(error, match="is gone" if error is RunError else None), distributed.joined():
        pass
