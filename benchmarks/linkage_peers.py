"""The peers of ``benchmarks.linkage``, each run in a process of its own.

    python -m benchmarks.linkage_peers splink|rapidfuzz FOLDER OUTPUT

FOLDER holds left/ and right/ (id and the columns), pairs/ (left_id, right_id) and splink.json; OUTPUT gets left_id,
right_id, score.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flipkd.demo.persons import COLUMNS, SEPARATOR


def splink(folder: Path, output: Path) -> None:
    """DuckDB reads and writes the files; the pairs are written in Splink's order."""
    from benchmarks.splink_model import connect, predict_splink

    connection = connect()
    names = ", ".join(COLUMNS)
    both = " union all ".join(
        f"select id as unique_id, {names} from read_parquet('{folder}/{side}/*.parquet')" for side in ("left", "right")
    )
    pairs = (
        f"select '0' as match_key, left_id as join_key_l, right_id as join_key_r from read_parquet('{folder}/pairs/*')"
    )
    trained = json.loads((folder / "splink.json").read_text(encoding="utf-8"))
    found = predict_splink(connection, connection.sql(both), connection.sql(pairs), trained)
    scored = f"select unique_id_l as left_id, unique_id_r as right_id, match_weight as score from {found.physical_name}"
    connection.execute(f"copy ({scored}) to '{output}/part-0.parquet' (format parquet)")


def rapidfuzz(folder: Path, output: Path) -> None:
    """``token_set_ratio`` of the texts, on all cores."""
    from rapidfuzz.fuzz import token_set_ratio
    from rapidfuzz.process import cpdist

    pairs = pq.read_table(folder / "pairs")
    sides = []
    for side in ("left", "right"):
        records = pq.read_table(folder / side)
        values = [pc.fill_null(records[name], "") for name in COLUMNS]
        texts = np.array(pc.binary_join_element_wise(*values, SEPARATOR).to_pylist(), object)
        sides.append(texts[pc.index_in(pairs[f"{side}_id"], records["id"]).to_numpy()])
    scores = cpdist(*sides, scorer=token_set_ratio, workers=-1)
    pq.write_table(pairs.append_column("score", pa.array(scores)), output / "part-0.parquet")


def main() -> None:
    """Runs one peer."""
    tools = {"splink": splink, "rapidfuzz": rapidfuzz}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=tools)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.mkdir()
    tools[arguments.tool](arguments.folder, arguments.output)


if __name__ == "__main__":
    main()
