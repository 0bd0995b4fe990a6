from __future__ import annotations

import hashlib
import stat
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flipkd import assets
from flipkd.errors import InputError


def make_wheel(folder: Path, extra: dict[str, bytes] | None = None, link: str | None = None) -> assets.Asset:
    """A tiny real wheel of the package flipkd-test-asset, and its pin."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "flipkd_test_asset-1.0-py3-none-any.whl"
    info = "flipkd_test_asset-1.0.dist-info"
    members = {
        "flipkd_test_asset/data/a.txt": b"alpha",
        "flipkd_test_asset/data/sub/b.txt": b"beta",
        "flipkd_test_asset/code.py": b"raise SystemExit",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: flipkd-test-asset\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
        **(extra or {}),
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if link is not None:
            entry = zipfile.ZipInfo(link)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "/etc/hostname")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return assets.Asset("flipkd-test-asset", "1.0", wheel.name, digest, ("flipkd_test_asset/data/",))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; pip reaches no index, only the folder tmp_path/index."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("FLIPKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache" / "assets"


def test_fetch_takes_the_wanted_members_with_pip_and_then_needs_no_pip(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = make_wheel(tmp_path / "index")
    folder = assets.fetch(asset)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["asset.json", "flipkd_test_asset/data/a.txt", "flipkd_test_asset/data/sub/b.txt"]
    assert (folder / "flipkd_test_asset/data/a.txt").read_bytes() == b"alpha"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not [path for path in cache.iterdir() if path.name.startswith(".download-")]

    monkeypatch.setattr(sys, "executable", "/nonexistent/python")  # starting pip would raise
    assert assets.fetch(asset) == folder


@pytest.mark.parametrize("damage", ["changed", "deleted", "seal"])
def test_a_damaged_cache_is_fetched_again(tmp_path: Path, cache: Path, damage: str) -> None:
    asset = make_wheel(tmp_path / "index")
    folder = assets.fetch(asset)
    victim = folder / "flipkd_test_asset/data/a.txt"
    if damage == "changed":
        victim.write_bytes(b"alphb")  # the size stays
    elif damage == "deleted":
        victim.unlink()
    else:
        (folder / "asset.json").write_text("{")
    assert assets.fetch(asset) == folder
    assert victim.read_bytes() == b"alpha"


def test_without_network_the_error_names_the_package_and_the_way_out(tmp_path: Path, cache: Path) -> None:
    asset = make_wheel(tmp_path / "elsewhere")
    with pytest.raises(InputError) as caught:
        assets.fetch(asset)
    assert "flipkd-test-asset==1.0" in str(caught.value)
    assert str(cache / asset.wheel) in str(caught.value)

    (cache / asset.wheel).write_bytes((tmp_path / "elsewhere" / asset.wheel).read_bytes())
    assert (assets.fetch(asset) / "flipkd_test_asset/data/sub/b.txt").read_bytes() == b"beta"


def test_another_wheel_under_the_same_name_is_refused(tmp_path: Path, cache: Path) -> None:
    pinned = make_wheel(tmp_path / "index")
    make_wheel(tmp_path / "index", extra={"flipkd_test_asset/data/c.txt": b"smuggled"})
    with pytest.raises(InputError, match="could not be fetched"):
        assets.fetch(pinned)
    (cache / pinned.wheel).write_bytes((tmp_path / "index" / pinned.wheel).read_bytes())
    with pytest.raises(InputError, match="is not the wheel"):
        assets.fetch(pinned)


@pytest.mark.parametrize("name", ["flipkd_test_asset/data/../../../evil.txt", "flipkd_test_asset/data/..\\evil.txt"])
def test_members_that_would_leave_the_cache_are_refused(tmp_path: Path, cache: Path, name: str) -> None:
    asset = make_wheel(tmp_path / "wheels", extra={name: b"evil"})
    assets.cache_folder()
    (cache / asset.wheel).write_bytes((tmp_path / "wheels" / asset.wheel).read_bytes())
    with pytest.raises(InputError, match="unsafe path"):
        assets.fetch(asset)
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_link_inside_a_wheel_is_refused(tmp_path: Path, cache: Path) -> None:
    asset = make_wheel(tmp_path / "wheels", link="flipkd_test_asset/data/link")
    assets.cache_folder()
    (cache / asset.wheel).write_bytes((tmp_path / "wheels" / asset.wheel).read_bytes())
    with pytest.raises(InputError, match="symbolic link"):
        assets.fetch(asset)


def test_two_at_once_get_one_whole_folder(tmp_path: Path, cache: Path) -> None:
    asset = make_wheel(tmp_path / "index")
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(assets.fetch, [asset] * 4))
    assert len(folders) == 1
    assert (folders.pop() / "flipkd_test_asset/data/a.txt").read_bytes() == b"alpha"


def test_minilm_is_a_sentence_transformers_folder(minilm_dir: Path) -> None:
    assert {"modules.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= {p.name for p in minilm_dir.iterdir()}


def test_icd9_rows_are_whole(icd9: list[tuple[str, str, str]]) -> None:
    assert len(icd9) == 12_924
    rows = {code: (long, short) for code, long, short in icd9}
    assert rows["0010"] == ("Cholera due to vibrio cholerae", "Cholera d/t vib cholerae")
    assert rows["38600"][0] == "Ménière's disease, unspecified"  # not UTF-8 in the source
    assert list(rows) == sorted(rows)
    assert all(text == text.strip() and text for pair in rows.values() for text in pair)
