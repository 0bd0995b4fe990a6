"""Faults for tests/run/test_chaos.py: a ``score`` job as a process, and what can befall it at a random moment.

A fault runs the job, disturbs it, sees how it ends, and mends what it broke, so that a rerun can finish.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from flipkd.run.manifest import MANIFEST, PLAN
from tests.run.faults import EATEN_BYTES
from tests.run.ray_cluster import ENVIRONMENT, Cluster, alive_workers, wait_until

UNITS = 200
# What the jobs are told, and what a test adds before it calls a job hung: starting Ray's workers on two busy cores.
STALL_S = 60
SHORT_STALL_S = 10
SHORT_START_S = 30
NODE_LOST_S = 120  # until Ray takes a node for dead, and has a new worker elsewhere, no unit may finish
GRACE_S = 60
# Per unit: long enough that a fault comes midway, short enough for fifty runs.
DELAY_S = {False: 0.004, True: 0.01}
MEMORY_LIMIT_BYTES = EATEN_BYTES // 2


@dataclass
class Site:
    """What all runs share: the pairs, a store, a folder."""

    pairs: Path
    store: Path
    folder: Path


@dataclass
class Run:
    """One job that is disturbed.

    Args:
        site: the work.
        output: the output folder.
        random: decides the moment and the victim.
        cluster: where the job runs; None for in process.
        processes: what was started, to be ended whatever happens.
        afterwards: what else is to be undone then.
    """

    site: Site
    output: Path
    random: random.Random
    cluster: Cluster | None
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    afterwards: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self, *options: str, fault: str = "", delayed: bool = True) -> subprocess.Popen[str]:
        """Starts the job, with two units in flight in process: as many as the cluster has workers."""
        where = ["--workers", "2"] if self.cluster is None else ["--ray", self.cluster.address]
        delay_s = DELAY_S[self.cluster is not None] if delayed else 0.0
        command = [
            sys.executable, "-m", "tests.run.faults", str(delay_s), fault, "score",
            "--pairs", str(self.site.pairs), "--output", str(self.output), "--store", str(self.site.store),
            "--rows-per-unit", "1", "--json", *where, *options,
        ]  # fmt: skip
        for limit in ("--stall-timeout-s", "--start-timeout-s"):
            if limit not in options:
                command += [limit, str(STALL_S)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.processes.append(process)
        return process

    def units_done(self) -> int:
        """Outputs that are there."""
        return len(list(self.output.glob("*.parquet")))

    def wait_for_a_moment(self, process: subprocess.Popen[str]) -> None:
        """Waits until a random number of units is done, or (one time in ten) not even that; or the job has ended."""
        wanted = self.random.randrange(1, UNITS * 19 // 20)
        if self.random.random() < 0.1:
            time.sleep(self.random.uniform(0, 1))
            return
        deadline = time.monotonic() + STALL_S + GRACE_S
        while process.poll() is None and self.units_done() < wanted:
            assert time.monotonic() < deadline, f"the job had not done {wanted} units within {STALL_S + GRACE_S} s"
            time.sleep(0.002)

    def wait_for_the_plan(self, process: subprocess.Popen[str]) -> None:
        """Waits until the job has looked at its input, or has ended."""
        deadline = time.monotonic() + GRACE_S
        while process.poll() is None and not (self.output / PLAN).exists():
            assert time.monotonic() < deadline, f"the job had no plan within {GRACE_S} s"
            time.sleep(0.002)

    def end(self, process: subprocess.Popen[str], limit_s: float = STALL_S + GRACE_S) -> tuple[int, str]:
        """Waits for the end. Returns the exit code, and what the job said on stderr."""
        try:
            _, told = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job hung: it had not ended after {limit_s:.0f} s") from None
        assert "Traceback" not in told, told
        return process.returncode, told

    def again(self, limit_s: float = STALL_S + GRACE_S) -> tuple[int, str, str]:
        """Runs the same job again, undisturbed. Returns the exit code, stdout and stderr."""
        process = self.start(delayed=False)
        try:
            told, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the rerun hung: it had not ended after {limit_s:.0f} s") from None
        return process.returncode, told, errors

    def worker(self, process: subprocess.Popen[str]) -> psutil.Process | None:
        """A random process that runs units on the cluster; None when the job ends before there is one."""
        assert self.cluster is not None
        while process.poll() is None:
            found = self.cluster.unit_workers()
            if found:
                return self.random.choice(found)
            time.sleep(0.05)
        return None


Fault = Callable[[Run], bool]  # runs the job; whether it was broken off


def kill_driver(run: Run) -> bool:
    """SIGKILL to the process that the user started."""
    process = run.start()
    run.wait_for_a_moment(process)
    process.send_signal(signal.SIGKILL)
    code, _ = run.end(process)
    assert code in (-signal.SIGKILL, 0)
    return code != 0


def kill_worker(run: Run) -> bool:
    """SIGKILL to a Ray worker; the job must not mind."""
    process = run.start()
    run.wait_for_a_moment(process)
    victim = run.worker(process)
    if victim is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    return ended_well(run, process)


def kill_node(run: Run) -> bool:
    """SIGKILL to all of a node; the job goes on with what is left. A new node takes its place."""
    assert run.cluster is not None
    process = run.start("--stall-timeout-s", str(NODE_LOST_S))
    run.wait_for_a_moment(process)
    node = run.random.choice([node for node in run.cluster.nodes[1:] if node.poll() is None])
    run.cluster.kill(node)
    try:
        return ended_well(run, process, NODE_LOST_S + GRACE_S)
    finally:
        run.cluster.add_worker()
        wait_until(lambda: alive_workers(run.cluster.address) == 2, 120)  # type: ignore[union-attr]


def exit_worker(run: Run) -> bool:
    """A worker that leaves with exit code 0 in the middle of a unit."""
    return ended_well(run, run.start(fault=f"exit:{a_file(run)}:{run.site.folder / 'left'}"))


def eat_memory(run: Run) -> bool:
    """A worker that takes memory until it is killed; this test stands in for the kernel, which would wait for more."""
    flag = run.site.folder / "ate"
    process = run.start(fault=f"eat:{a_file(run)}:{flag}")
    killed = 0
    while process.poll() is None and not killed:
        assert run.cluster is not None
        sizes = {}
        for worker in run.cluster.unit_workers() if flag.exists() else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes[worker] = worker.memory_info().rss
        if sizes and max(sizes.values()) > MEMORY_LIMIT_BYTES:
            max(sizes, key=sizes.__getitem__).kill()
            killed += 1
        time.sleep(0.1)
    assert killed == 1, run.end(process)
    return ended_well(run, process)


def stop_worker(run: Run) -> bool:
    """A worker that hangs: the job ends within the stated time, and a rerun on the same cluster finishes.

    One that hangs as it starts ends the job by another limit than one that hangs in a unit.
    """
    process = run.start("--stall-timeout-s", str(SHORT_STALL_S), "--start-timeout-s", str(SHORT_START_S))
    run.wait_for_a_moment(process)
    victim = run.worker(process)
    if victim is None:
        return ended_well(run, process)
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.suspend()
    try:
        code, told = run.end(process, SHORT_START_S + SHORT_STALL_S + GRACE_S)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    limits = (
        f"no unit finished for --stall-timeout-s {SHORT_STALL_S}",
        f"no Ray worker could start within --start-timeout-s {SHORT_START_S}",
    )
    assert code == 0 or (code == 1 and any(limit in told for limit in limits)), told
    return code != 0


def stop_driver(run: Run) -> bool:
    """A driver that hangs: a second one is refused while it lives."""
    process = run.start()
    run.wait_for_a_moment(process)
    process.send_signal(signal.SIGSTOP)
    # With a manifest it is at its very end, and its lock is free.
    if process.poll() is None and (run.output / PLAN).exists() and not (run.output / MANIFEST).exists():
        code, told = run.end(run.start())
        assert code == 1, told
        assert "another job is working on" in told
    process.send_signal(signal.SIGKILL)
    return run.end(process)[0] != 0


def fill_disk(run: Run) -> bool:
    """The output's disk has room for a part of the units. Without a mount: no file may grow beyond a few bytes."""
    disk = run.output.parent
    disk.mkdir(exist_ok=True)
    if not mounted(disk, f"size={run.random.randrange(480, 780)}k"):
        return fill_disk_without_mount(run)
    run.afterwards.callback(subprocess.run, ["umount", str(disk)], check=True)
    code, told = run.end(run.start())
    assert code == 0 or (code == 1 and ("No space left on device" in told or "and the disk has" in told)), told
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    return code != 0


def fill_disk_without_mount(run: Run) -> bool:
    """RLIMIT_FSIZE of the driver (EFBIG for ENOSPC); in process only, where the driver writes."""
    if run.cluster is not None:
        pytest.skip("on Ray a full disk needs a mount, which needs root")
    process = run.start()
    run.wait_for_a_moment(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (100, 100))
    code, told = run.end(process)
    assert code == 0 or (code == 1 and "File too large" in told), told
    return code != 0


def read_only(run: Run) -> bool:
    """The output turns read-only: an empty read-only disk over it (root), or its mode (others)."""
    process = run.start()
    run.wait_for_a_moment(process)
    run.output.mkdir(parents=True, exist_ok=True)
    mode = run.output.stat().st_mode
    over = mounted(run.output, "ro,size=1m")
    if not over:
        run.output.chmod(0o500)
    try:
        code, told = run.end(process)
    finally:
        if over:
            subprocess.run(["umount", str(run.output)], check=True)
        run.output.chmod(mode)
    # A unit that was being written when the disk went away finds its hidden file gone.
    causes = ("Read-only file system", "Permission denied", "No such file or directory")
    assert code == 0 or (code == 1 and "cannot write" in told and any(cause in told for cause in causes)), told
    return code != 0


def lose_shard(run: Run) -> bool:
    """An input file is cut off, overwritten, deleted or replaced while the job reads; then it is as it was before.

    Not before the job has planned: its outputs would rightly be those of the other input, and the rerun refused.
    """
    process = run.start()
    run.wait_for_a_moment(process)
    run.wait_for_the_plan(process)
    names = {path.name.split(".")[0] for path in run.output.glob("*.parquet")}
    files = sorted(run.site.pairs.glob("*.parquet"))
    victim = run.random.choice([path for path in files if path.stem not in names] or files)
    safe, times = run.site.folder / "safe", victim.stat()
    shutil.copy2(victim, safe)
    how = run.random.choice((cut_off, overwrite, Path.unlink, replace))
    how(victim)
    try:
        code, told = run.end(process)
    finally:
        safe.replace(victim)
        os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert code == 0 or (code == 1 and victim.name in told), f"{how.__name__}: {told}"
    return code != 0


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(path.stat().st_size))


def replace(path: Path) -> None:
    """Another table of the same columns takes its place in one step."""
    other = path.with_name(".other")
    shutil.copy2(next(one for one in sorted(path.parent.glob("*.parquet")) if one != path), other)
    other.replace(path)


def ended_well(run: Run, process: subprocess.Popen[str], limit_s: float = STALL_S + GRACE_S) -> bool:
    code, told = run.end(process, limit_s)
    assert code == 0, told
    return False


def a_file(run: Run) -> str:
    return run.random.choice(sorted(run.site.pairs.glob("*.parquet"))).stem


def mounted(folder: Path, options: str) -> bool:
    """Mounts a tmpfs on a folder, if this user may."""
    command = ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@contextlib.contextmanager
def ending(run: Run) -> Iterator[None]:
    """Ends what a failed run has left, and undoes what it has mounted."""
    try:
        yield
    finally:
        for process in run.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
        run.afterwards.close()
