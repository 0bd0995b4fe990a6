"""The output folder of a job: whose it is, what is done, and what a killed run left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.fs as pafs

from flipkd.data.commit import TEMPORARY_NAME, writing
from flipkd.data.find import PARQUET_SUFFIXES, is_hidden
from flipkd.data.location import Location, reason
from flipkd.errors import OutputError
from flipkd.run.manifest import MANIFEST, WORK_FOLDER, UnitReport, read_whole_reports
from flipkd.run.units import FINGERPRINT_CHARACTERS, WorkUnit

logger = logging.getLogger(__name__)

# What `units._unit` makes of a unit; only files named like this are ever deleted.
_OUTPUT_NAME = re.compile(rf"\.rows\d{{12,}}-\d{{12,}}\.[0-9a-f]{{{FINGERPRINT_CHARACTERS}}}\.parquet$")
# Folders in which ``score`` and ``teach`` work; below a --cache those of other names are somebody else's.
STORE_NAME = re.compile(r"store-[0-9a-f]{16}")
WORK_NAME = re.compile(r"work-[0-9a-f]{16}(-[0-9a-f]{8})?")


def list_outputs(output: Location) -> tuple[set[str], list[str]]:
    """Names of the Parquet files below the folder, and paths of temporary files that a killed run left.

    One listing: its cost grows with the number of units.

    Raises:
        OutputError: the folder cannot be listed; or a symbolic link stands below it (it may itself be one): what is
            written or deleted there would be elsewhere.
    """
    selector = pafs.FileSelector(output.path, recursive=True, allow_not_found=True)
    names, temporary = set(), []
    root = output.path.rstrip("/") + "/"
    try:
        found = output.filesystem.get_file_info(selector)
    except OSError as error:
        raise OutputError(f"cannot list {output.uri}: {reason(error)}") from error
    for info in found:
        if output.is_local and os.path.islink(info.path):
            raise OutputError(f"{info.path} is a symbolic link inside an output folder; put the folder itself there")
        if info.type != pafs.FileType.File:
            continue
        name = info.path[len(root) :] if info.path.startswith(root) else info.path.lstrip("/")
        folder, base = posixpath.split(name)
        inside = name.startswith(f"{WORK_FOLDER}/")  # there only what stands beside the plan is this job's own
        if TEMPORARY_NAME.fullmatch(base) and (not inside or folder == WORK_FOLDER):
            temporary.append(info.path)
        elif inside:
            continue
        elif name.lower().endswith(PARQUET_SUFFIXES) and not is_hidden(posixpath.basename(name)):
            names.add(name)
    return names, temporary


def remove_temporary(output: Location) -> set[str]:
    """Deletes the temporary files of killed writers; nobody may be writing. Names of the Parquet files as a by-product.

    Raises:
        OutputError: a file cannot be deleted.
    """
    names, temporary = list_outputs(output)
    with writing(output.uri):
        for path in temporary:
            output.filesystem.delete_file(path)
    return names


def prepare(output: Location, units: Sequence[WorkUnit], overwrite: bool) -> dict[str, UnitReport]:
    """Makes the locked folder ready and says which of the units are done already.

    An output that is not whole any more is deleted, so that its unit is done again; see ``read_report``.

    Returns:
        By name of the output, what its footer tells.

    Raises:
        OutputError: the folder holds files of another run (or of input that has changed) and ``overwrite`` is off, or
            Parquet files that flipkd did not write.
        InputError: an output cannot be read now.
    """
    wanted = {unit.output: unit.fingerprint for unit in units}
    names = own_outputs(output, wanted.keys(), overwrite)
    return _whole(output, {name: wanted[name] for name in sorted(names)})


def own_outputs(output: Location, wanted: Collection[str], overwrite: bool) -> set[str]:
    """Names of the outputs in the locked folder, which are all wanted.

    Args:
        output: the folder.
        wanted: names of this run's outputs.
        overwrite: whether the outputs of another run are deleted, with all that stands beside them.

    Raises:
        OutputError: see ``prepare``.
    """
    names = remove_temporary(output)
    foreign = names - set(wanted)
    if not foreign:
        return names
    strangers = [name for name in foreign if not _OUTPUT_NAME.search(name)]
    if strangers:
        raise OutputError(
            f"{output.uri} holds {len(strangers)} Parquet files that flipkd did not write (such as {min(strangers)}); "
            "choose another --output"
        )
    if not overwrite:
        raise OutputError(
            f"{output.uri} holds {len(foreign)} files of another run, or of input that has changed since "
            f"(such as {min(foreign)}); choose another --output, or pass --overwrite to delete them"
        )
    logger.info("deleting %d files of another run in %s", len(names), output.uri)
    remove_manifest(output)
    remove_outputs(output, names)
    return set()


def remove_manifest(output: Location) -> None:
    """Deletes the manifest, so that nobody takes a folder for finished that lacks outputs. It need not be there."""
    with writing(output.uri), contextlib.suppress(FileNotFoundError, pa.ArrowException):
        output.filesystem.delete_file(output.child(MANIFEST).path)


def _whole(output: Location, found: Mapping[str, str]) -> dict[str, UnitReport]:
    done = {}
    for name, report in zip(found, read_whole_reports(output, found), strict=True):
        if isinstance(report, UnitReport):
            done[name] = report
            continue
        logger.warning("%s of %s is damaged; it is made again", name, output.uri)
        remove_outputs(output, [name])
    return done


def remove_outputs(output: Location, names: Iterable[str]) -> None:
    """Deletes outputs of flipkd's own.

    Raises:
        OutputError: one cannot be deleted.
    """
    with writing(output.uri):
        for name in sorted(names):
            output.filesystem.delete_file(output.child(name).path)


def remove_otherwise_made(
    output: Location, done: Mapping[str, UnitReport], basis: Callable[[str], str]
) -> dict[str, UnitReport]:
    """Deletes outputs that were made of something else than can be read now; returns the others.

    Args:
        output: the locked folder.
        done: what ``prepare`` has found.
        basis: from the name of an output to what ``UnitReport.basis`` has to be.
    """
    kept = {name: report for name, report in done.items() if report.basis == basis(name)}
    remove_outputs(output, done.keys() - kept.keys())
    return kept


def remove_folder(location: Location) -> None:
    """Deletes a work folder of flipkd's own; nothing when it is not there."""
    if location.is_local:
        shutil.rmtree(location.path, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError, OSError):
        location.filesystem.delete_dir(location.path)


def remove_stale_work(folder: Location, keep: Collection[str], end: str = "") -> None:
    """Deletes work folders and stores that killed runs of other input or options left: they hold texts.

    Args:
        folder: whose direct children they are; nobody else may be working in those that are deleted.
        keep: names that stay.
        end: of the names that may be deleted.
    """
    for info in folder.filesystem.get_file_info(pafs.FileSelector(folder.path, allow_not_found=True)):
        name = posixpath.basename(info.path)
        is_own = WORK_NAME.fullmatch(name) or STORE_NAME.fullmatch(name)
        if is_own and info.type == pafs.FileType.Directory and name.endswith(end) and name not in keep:
            remove_folder(folder.child(name))


def check_space(output: Location, needed_bytes: int, has_columns: bool) -> None:
    """Refuses to start when the disk is known to be too small for the output.

    Args:
        output: the folder.
        needed_bytes: estimated.
        has_columns: whether the job has the option ``--columns``.

    Raises:
        OutputError: says what is needed and what is free.
    """
    if not output.is_local:
        return
    folder = output.path
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        way_out = "free some space, or choose another --output"
        if has_columns:
            way_out = "free some space, write fewer columns (--columns), or choose another --output"
        raise OutputError(
            f"{output.uri} needs about {_size(needed_bytes)} and the disk has {_size(free)} free; {way_out}"
        )


def _size(count: int) -> str:
    unit = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**unit:.4g} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"
