"""Who has a cache without its key can test no guess; what is forgotten is nowhere."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flipkd.config import EncodeConfig, EncoderOptions
from flipkd.data.commit import make_private_folder
from flipkd.run.encode import encode, encoder_fingerprint
from flipkd.run.forget import forget
from flipkd.vectors.cache import CACHE_FOLDER, KEY_FILE, open_cache
from flipkd.vectors.layout import HEADER_FILE, STORE_FILES
from flipkd.vectors.store import VectorStore
from tests.privacy.canary import TEXT, World, files


@pytest.fixture
def config(world: World, minilm_dir: Path, tmp_path: Path) -> EncodeConfig:
    return EncodeConfig(
        EncoderOptions(str(minilm_dir)), str(world.records), str(tmp_path / "store"), cache=str(tmp_path / "cache")
    )


def guesses(text: str, salts: list[bytes]) -> list[bytes]:
    """What somebody without the key could compute of a text that he guesses, 8 bytes of each."""
    plain = [text.encode(), text.lower().encode(), text.encode("utf-16-le")]
    hashes = [
        hashlib.new(name, data).digest() for name in ("md5", "sha1", "sha256", "blake2b", "blake2s") for data in plain
    ]
    keys = [b"", *salts, *(hashlib.sha256(salt).digest() for salt in salts)]
    for size in (8, 16, 32):
        hashes += [hashlib.blake2b(data, digest_size=size, key=key).digest() for key in keys for data in plain]
        hashes += [hashlib.blake2b(data, digest_size=size, salt=salt[:16]).digest() for salt in keys for data in plain]
    return [found[:8] for found in hashes]


def test_no_guess_finds_a_text_without_the_key(config: EncodeConfig, tmp_path: Path) -> None:
    encode(config)
    folder = tmp_path / "cache" / CACHE_FOLDER
    encoder = encoder_fingerprint(config.encoder)
    cache = open_cache(folder, encoder, config.dtype)
    assert cache.look_up(cache.keys(pa.array([TEXT], pa.large_string()))).found.tolist() == [True]
    salts = [cache.kind.namespace, cache.kind.key_id, encoder.encode()[:64], bytes.fromhex(encoder)]
    stored = b"".join(path.read_bytes() for path in files(folder) if path.name != KEY_FILE)
    assert not [guess for guess in guesses(TEXT, salts) if guess in stored]
    assert guesses("x", [])  # they are some

    # With another key the same text is not found, though its vector is in the folder.
    stolen = tmp_path / "stolen"
    shutil.copytree(folder, stolen)
    (stolen / KEY_FILE).unlink()
    other = open_cache(stolen, encoder, config.dtype)
    assert other.look_up(other.keys(pa.array([TEXT], pa.large_string()))).found.tolist() == [False]


def traces(config: EncodeConfig) -> dict[str, bytes]:
    """What is kept of the canary's record: its vector, its id, and the halves of its key in the cache."""
    store = VectorStore.open(config.output)
    folder = Path(str(config.cache)) / CACHE_FOLDER
    cache = open_cache(folder, encoder_fingerprint(config.encoder), config.dtype)
    keys = cache.keys(pa.array([TEXT], pa.large_string()))
    return {
        "vector": store.rows.values[3].tobytes(),
        "first half": keys[0, :1].astype("<u8").tobytes(),
        "second half": keys[0, 1:].astype("<u8").tobytes(),
    }


def holding(folder: Path, found: dict[str, bytes]) -> dict[str, list[str]]:
    return {
        what: sorted(path.relative_to(folder).as_posix() for path in files(folder) if data in path.read_bytes())
        for what, data in found.items()
    }


def test_what_is_forgotten_is_nowhere(config: EncodeConfig, world: World, tmp_path: Path) -> None:
    encode(config)
    found = traces(config)
    before = holding(tmp_path, found)
    assert [len(names) for names in before.values()] == [2, 1, 1]
    told = forget(config, str(world.ids))
    assert told == {"ids": 1, "ids_not_found": 0, "texts": 1, "deleted_vectors": 1, "deleted_stores": 1}
    assert holding(tmp_path, found) == {"vector": [], "first half": [], "second half": []}


KILLED = """
import os, pathlib, signal, sys
from flipkd.cli import main
original = pathlib.Path.unlink
def unlink(self, missing_ok=False):
    original(self, missing_ok)
    if self.name == "store.json":
        os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.unlink = unlink
main(sys.argv[1:])
"""


def test_a_deletion_that_was_broken_off_is_done_again(config: EncodeConfig, world: World, tmp_path: Path) -> None:
    encode(config)
    found = traces(config)
    command = [sys.executable, "-c", KILLED, "encode", "--encoder", config.encoder.folder, "--records", config.records,
               "--output", config.output, "--cache", str(config.cache), "--forget", str(world.ids)]  # fmt: skip
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (Path(config.output) / HEADER_FILE).exists()
    assert holding(tmp_path, found)["vector"] == ["store/vectors.bin"]
    assert forget(config, str(world.ids))["deleted_stores"] == 1
    assert holding(tmp_path, found)["vector"] == []


def test_only_folders_of_scores_own_names_are_deleted(config: EncodeConfig, world: World, tmp_path: Path) -> None:
    encode(config)
    keep = [tmp_path / "cache/work-2026-11-03/thesis.txt", tmp_path / "cache/store-keys/a.txt",
            tmp_path / "cache/work-0123456789abcdeg/b.txt"]  # fmt: skip
    gone = tmp_path / "cache/work-0123456789abcdef"
    for path in keep:
        path.parent.mkdir()
        path.write_text("mine")
    make_private_folder(str(gone))
    forget(config, str(world.ids))
    assert all(path.exists() for path in keep)
    assert not gone.exists()


def test_a_folder_of_somebody_elses_vectors_is_not_touched(config: EncodeConfig, world: World, tmp_path: Path) -> None:
    encode(config)
    for name in STORE_FILES:
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs" / name).write_bytes(np.arange(4).tobytes())

    assert forget(replace(config, output=str(tmp_path / "theirs")), str(world.ids))["deleted_stores"] == 0
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == sorted(STORE_FILES)
