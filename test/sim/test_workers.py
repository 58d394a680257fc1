"""Worker processes: every job is answered, whatever becomes of the process that was at it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from mllm.errors import PolicyError
from sim.errors import ConfigurationError, EnvironmentFault
from sim.workers import Pool

MODULE = """
import os, signal, time
from mllm.errors import PolicyError
from sim.errors import ConfigurationError

class Target:
    def __init__(self, name):
        self.name = name

    def __call__(self, job):
        if job == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if job == "exit":
            os._exit(3)
        if job == "hang":
            time.sleep(3600)
        if job == "pid":
            return os.getpid()
        if job == "threads":
            return os.environ["OMP_NUM_THREADS"]
        if job == "disk":
            raise OSError(28, "No space left on device: /some/file was not written")
        if job == "policy":
            raise PolicyError("no such checkpoint")
        if job == "configuration":
            raise ConfigurationError("no such task")
        if job == "bug":
            return 1 / 0
        return self.name + job

    def close(self):
        if self.name.startswith("/"):
            open(self.name, "w").close()
"""


@pytest.fixture
def pool(tmp_path, monkeypatch):
    (tmp_path / "target_of_pool.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda workers=1, limit=60.0, name="did ": Pool("target_of_pool", "Target", (name,), workers, limit)


def test_every_job_is_answered_once(pool):
    units = [["a", "b"], ["c"], [], ["d", "e", "f"]]
    with pool(workers=2) as running:
        answers = list(running.run(units))
    assert sorted(answers) == [(job, f"did {job}") for job in "abcdef"]


def test_a_unit_stays_with_one_process_and_work_is_shared(pool):
    with pool(workers=2) as running:
        answers = [value for _, value in running.run([["pid", "pid"], ["pid", "pid"]])]
    assert len(set(answers)) == 2
    assert all(answers.count(value) == 2 for value in answers)


def test_a_process_has_one_thread_of_each_library(pool, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    with pool() as running:
        assert list(running.run([["threads"]])) == [("threads", "1")]


@pytest.mark.parametrize(("job", "how"), [("crash", "died of SIGSEGV"), ("exit", "exited with status 3")])
def test_a_process_that_ends_costs_its_job_and_nothing_else(pool, job, how):
    with pool() as running:
        answers = dict(running.run([["a", job, "b"], ["c"]]))
    assert isinstance(answers[job], EnvironmentFault)
    assert how in str(answers[job])
    assert {key: value for key, value in answers.items() if key != job} == {key: f"did {key}" for key in "abc"}


def test_a_job_that_takes_too_long_is_ended(pool):
    with pool(limit=2.0) as running:
        ((job, answer),) = running.run([["hang"]])
    assert job == "hang"
    assert isinstance(answer, EnvironmentFault)
    assert "stopped answering" in str(answer)


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        ("disk", OSError, "No space left on device: /some/file"),
        ("policy", PolicyError, "no such checkpoint"),
        ("configuration", ConfigurationError, "no such task"),
        ("bug", EnvironmentFault, "ZeroDivisionError"),
    ],
)
def test_an_error_that_every_job_would_meet_ends_the_run(pool, job, error, message):
    with pool() as running, pytest.raises(error, match=message):
        list(running.run([["a", job, "b"]]))


def test_an_idle_process_cleans_up_when_the_pool_closes(pool, tmp_path):
    with pool(name=str(tmp_path / "closed")) as running:
        list(running.run([["a"]]))
    assert (tmp_path / "closed").exists()


def test_processes_die_with_their_parent(pool, tmp_path):
    code = """
import sys
from sim.workers import Pool
with Pool("target_of_pool", "Target", ("did ",), 1, 60.0) as running:
    for job, value in running.run([["pid", "hang"]]):
        print(value, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        handle = os.pidfd_open(worker)
        parent.send_signal(signal.SIGKILL)
    # A pidfd becomes readable when its process ends.
    ended, _, _ = select.select([handle], [], [], 30.0)
    os.close(handle)
    assert ended
