"""The stages before a job over pairs that hold their texts: list the distinct ones, encode them into a store."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from flipkd.config import EncodeConfig
from flipkd.data.location import Location, open_location
from flipkd.run.encode import encode_planned, plan_encode
from flipkd.run.job import Job, run_job
from flipkd.run.output import remove_folder
from flipkd.run.stages import summary
from flipkd.run.texts import TextsTask, TextsWorker, is_merged, merge_texts
from flipkd.run.units import Plan


def encode_inline(
    job: Job, texts: TextsTask, work: Location, encode: EncodeConfig, encoder: str
) -> tuple[Plan, dict[str, Any]]:
    """Lists the distinct texts of all units of a job over inline pairs, and encodes them into a store.

    Args:
        job: over the pairs; its units, fingerprint and way to run are taken.
        texts: what to list; ``output`` is below ``work``.
        work: folder for the lists and the texts; left for the caller to remove.
        encode: makes the store of the records ``work``/texts; the ids of the store are the texts' digests.
        encoder: ``encoder_fingerprint`` of the encoder.

    Returns:
        The plan of the units whose texts are in the store (others could not be read and were skipped), and what the two
        stages say of themselves.
    """
    listed = run_job(
        replace(
            job,
            kind="texts",
            output=texts.output,
            make_worker=partial(TextsWorker, texts),
            uses_model=False,
            output_bytes=0,
            about={},
        )
    )
    failed = {failure["output"] for failure in listed["skipped_units"]}
    units = [unit for unit in job.plan.units if unit.output not in failed]
    names, merged = [unit.output for unit in units], work.child("texts")
    if not is_merged(names, merged):
        # What an earlier run has made holds the texts of other units: some could not be read then, or cannot now.
        remove_folder(open_location(encode.output))
        merge_texts(texts.output, names, merged)
    encoded = encode_planned(plan_encode(encode, encoder=encoder))
    return replace(job.plan, units=units), {"texts": summary(listed), "encode": summary(encoded)}
