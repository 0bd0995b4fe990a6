"""On Ray too no word of a record gets out, and a cluster with a token lets nobody in without it.

Clusters are real ones on this machine, on loopback.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.privacy.canary import ID_WORD, TEXT, World, files, leaks, words_in, write
from tests.run.ray_cluster import RAY, ROOT, free_port, wait_until

pytestmark = pytest.mark.slow

# All that Ray keeps of a job: the tables of its state API, and the key-value store of its head.
STATE = """
import json, sys, ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list
from ray.util import state
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
told = {}
for name in ("tasks", "actors", "objects", "workers", "jobs", "nodes", "placement_groups", "runtime_envs"):
    options = {"address": sys.argv[2], "limit": 10_000, "detail": True, "raise_on_missing_output": False, "timeout": 60}
    told[name] = [repr(entry) for entry in getattr(state, f"list_{name}")(**options)]
spaces = (None, b"fun", b"cluster", b"session", b"job", b"dashboard", b"serve", b"tracing", b"usage_stats")
for space in spaces:
    for key in _internal_kv_list(b"", namespace=space):
        value = _internal_kv_get(key, namespace=space) or b""
        told.setdefault("kv", []).append(repr(key) + value.decode("latin-1"))
json.dump(told, sys.stdout)
"""


@dataclass
class Head:
    """A head node with its dashboard, and where it keeps what it keeps."""

    address: str
    dashboard: str
    folder: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def run(self, *command: object, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """Runs a command with the environment of who has the token, or with changes of it."""
        merged = {name: value for name, value in {**self.environment, **changes}.items() if value is not None}
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, timeout=300, env=merged
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Its folder has a short name: paths of sockets are bounded."""
    with tempfile.TemporaryDirectory(prefix="fk-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "token").write_text(secrets.token_hex(32))
        (folder / "token").chmod(0o600)
        (folder / "tmp").mkdir()
        environment = {**os.environ, "PYTHONPATH": ROOT, "RAY_AUTH_MODE": "token", "TMPDIR": str(folder / "tmp"),
                       "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "HOME": str(folder)}  # fmt: skip
        environment.pop("RAY_AUTH_TOKEN", None)
        port, dashboard = free_port(), free_port()
        command = [
            *RAY, "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
            f"--port={port}", "--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={folder / 'ray'}",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        ]  # fmt: skip
        with open(folder / "head.log", "wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=environment, umask=0o077
            )
        made = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", folder, environment, process)
        try:
            wait_until(lambda: made.run(*RAY, "status", f"--address={made.address}").returncode == 0, 120)
            yield made
        finally:
            for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                try:
                    child.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            process.wait()


def flipkd(head: Head, *words: object, code: int = 0) -> None:
    stalls = () if words[0] == "train" else ("--stall-timeout-s", "120")
    done = head.run(sys.executable, "-m", "flipkd.cli", *words, "--ray", head.address, "--no-progress",
                    "--log-level", "debug", "--log-format", "json", *stalls)  # fmt: skip
    assert done.returncode == code, done.stderr
    assert all(isinstance(json.loads(line), dict) for line in done.stderr.splitlines()), done.stderr
    assert not words_in(done.stdout + done.stderr)
    assert code == 0 or "Error: " in done.stderr


def test_no_word_of_a_record_stays_with_ray(
    head: Head, world: World, minilm_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    by_id = ["--encoder", minilm_dir, "--records", world.records, "--pairs", world.pairs]
    flipkd(head, "score", *by_id, "--output", out / "by-id", "--columns", "score", "--top-k", "1")
    flipkd(head, "score", "--encoder", minilm_dir, "--pairs", world.inline, "--output", out / "inline")
    taught = ["--teacher", minilm_dir, "--pairs", world.pairs, "--records", world.records]
    flipkd(head, "teach", *taught, "--output", out / "taught")
    student = ["--student", base_dir, "--layer", "2", "--dimension", "8", "--rank", "4", "--threads", "1"]
    steps = ["--steps", "2", "--batch-pairs", "8", "--workers", "1", "--gpus", "0"]
    flipkd(head, "train", *student, "--pairs", out / "taught", "--output", out / "run", *steps)
    flipkd(head, "rescore", "--scores", out / "inline", "--llm", base_dir, "--band=-1:1", "--output", out / "rescored")
    # And what ends badly: conflicting records, a broken file, a column of lists, a fault that none foresaw.
    write(tmp_path / "in/conflict/0.parquet", id=["a", "a"], text=[TEXT, TEXT + "!"])
    conflict = ["--encoder", minilm_dir, "--records", tmp_path / "in/conflict", "--pairs", world.pairs]
    flipkd(head, "score", *conflict, "--output", out / "conflict", "--columns", "score", code=1)
    broken = world.inline.parent / "broken/0.parquet"
    broken.parent.mkdir()
    whole = (world.inline / "0.parquet").read_bytes()
    middle = len(whole) // 3
    broken.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])  # the footer is whole, the pages are not
    flipkd(head, "score", "--encoder", minilm_dir, "--pairs", broken.parent, "--output", out / "broken", code=1)
    texts = {"left_text": [TEXT], "right_text": [TEXT], "score": [0.5], "probability": [0.5]}
    write(tmp_path / "in/odd/0.parquet", **texts)
    write(tmp_path / "in/odd/1.parquet", **texts, x=[[TEXT]])
    odd = ["--scores", tmp_path / "in/odd", "--llm", base_dir, "--band", "0:1", "--left-text", "x"]
    flipkd(head, "rescore", *odd, "--output", out / "odd", code=2)
    faults = {"unit": "this should not happen, please report it", "start": "a worker could not start"}
    for where, message in faults.items():
        options = ["--encoder", minilm_dir, "--pairs", world.inline, "--output", out / "fault", "--no-progress"]
        options += ["--log-level", "debug"]
        faulty = [sys.executable, "-m", "tests.privacy.faults", where, "score", *options, "--ray", head.address]
        fault = head.run(*faulty)
        assert fault.returncode == 1
        assert f"{message}: builtins.ValueError" in fault.stderr
        assert not words_in(fault.stdout + fault.stderr)

    done = head.run(sys.executable, "-c", STATE, head.address, head.dashboard)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["tasks"]) > 5
    assert len(told["actors"]) > 5
    assert len(told["kv"]) > 5
    found = {name: words_in(json.dumps(entries, ensure_ascii=False)) for name, entries in told.items()}
    assert not any(found.values()), found
    logs = list((head.folder / "ray").rglob("*.log"))
    assert len(logs) > 10
    assert leaks(head.folder) == {}
    assert {name.split("/")[0] for name in leaks(out, ["*/.flipkd/**/ids.bin", "*/.flipkd/**/*.parquet"])} == {
        "inline", "taught", "rescored"
    }  # fmt: skip


def test_the_logs_of_ray_do_tell_of_what_is_raised(head: Head) -> None:
    """Else nothing would have been there to find."""
    code = (
        "import ray, sys\nray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False)\n"
        f"class A:\n    def __init__(self): raise ValueError({ID_WORD!r})\n    def f(self): pass\n"
        "try: ray.get(ray.remote(A).remote().f.remote())\nexcept ray.exceptions.RayError: pass\n"
    )
    assert head.run(sys.executable, "-c", code, head.address).returncode == 0
    assert any(words == {ID_WORD} for words in leaks(head.folder / "ray").values())


@pytest.mark.parametrize(
    "changes",
    [{"RAY_AUTH_TOKEN_PATH": None, "RAY_AUTH_MODE": None}, {"RAY_AUTH_TOKEN_PATH": None},
     {"RAY_AUTH_TOKEN_PATH": None, "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["without authentication", "without a token", "with a wrong token"],
)  # fmt: skip
def test_a_client_without_the_token_is_refused(
    head: Head, world: World, tmp_path: Path, minilm_dir: Path, changes: dict[str, str | None]
) -> None:
    (tmp_path / "home").mkdir()
    changes = {**changes, "HOME": str(tmp_path / "home")}
    options = ["--encoder", minilm_dir, "--pairs", world.inline, "--output", tmp_path / "out"]
    done = head.run(sys.executable, "-m", "flipkd.cli", "score", *options, "--ray", head.address, **changes)
    assert done.returncode == 1, done.stdout
    assert f"--ray {head.address}: cannot join the cluster" in done.stderr
    assert "it asks for a token: set RAY_AUTH_MODE=token" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*.parquet"))
    # The dashboard, which takes jobs, asks for it as well.
    submit = [*RAY[:2], "ray.scripts.scripts", "job", "submit", "--address", head.dashboard, "--", "true"]
    assert head.run(*submit, **changes).returncode != 0


def test_a_client_with_the_token_is_let_in(head: Head, world: World, tmp_path: Path, minilm_dir: Path) -> None:
    token = (head.folder / "token").read_text()
    options = ["--encoder", minilm_dir, "--pairs", world.inline, "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "flipkd.cli", "score", *options, "--ray", head.address]
    done = head.run(*command, RAY_AUTH_TOKEN=token, RAY_AUTH_TOKEN_PATH=None)
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr
    assert not [path for path in files(tmp_path / "out") if token.encode() in path.read_bytes()]


def test_the_dashboard_and_its_token_are_for_this_machine_alone(head: Head) -> None:
    port = int(head.dashboard.rpartition(":")[2])
    listening = {
        connection.laddr.ip
        for process in psutil.Process(head.process.pid).children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}
    assert stat.S_IMODE((head.folder / "token").stat().st_mode) == 0o600


def test_a_ray_of_ones_own_is_private(world: World, tmp_path: Path, minilm_dir: Path) -> None:
    """``--ray local`` asks for a token by itself, and no file of its session can be read by others, nor a socket."""
    with tempfile.TemporaryDirectory(prefix="fk-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        environment = {**os.environ, "PYTHONPATH": ROOT, "RAY_TMPDIR": name, "HOME": str(folder / "home")}
        for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            environment.pop(variable, None)
        (folder / "home").mkdir()
        options = ["--encoder", minilm_dir, "--pairs", world.inline, "--output", tmp_path / "out"]
        command = [sys.executable, "-m", "flipkd.cli", "score", *options, "--ray", "local", "--no-progress"]
        done = subprocess.run(
            list(map(str, command)), env=environment, umask=0, check=False, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert not words_in(done.stdout + done.stderr)
        assert leaks(folder) == {}
        assert (folder / "home/.ray/auth_token").exists()
        inodes = [path for path in folder.rglob("*") if not path.is_symlink() and not path.is_dir()]
        assert any(stat.S_ISREG(path.stat().st_mode) for path in inodes)
        readable = [str(path) for path in inodes if stat.S_IMODE(path.stat().st_mode) & 0o077]
        assert readable == []
