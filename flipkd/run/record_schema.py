"""What the footers of a record table tell before any work: whether ids and texts can be made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from flipkd.data.find import Shard
from flipkd.data.location import Location
from flipkd.data.records import as_text
from flipkd.data.shards import ShardReader
from flipkd.data.template import template_fields
from flipkd.errors import ConfigError, InputError
from flipkd.record_sides import option_of_side
from flipkd.vectors.id_types import check_id_type, common_kind, decoded

_BATCH_ROWS = 1 << 16


class RecordSchema:
    """The schema of a record table, looked at file by file; files may come from several threads.

    Args:
        id_column: of the records.
        template: of their texts.
        is_right: whether the table is the right side's, whose options have names of their own.
        told_by: the file that the template is from, if it is the encoder's.

    Raises:
        ConfigError: the template does not parse.
    """

    def __init__(self, id_column: str, template: str, is_right: bool = False, told_by: Path | None = None) -> None:
        self._id_column, self._template, self._told_by = id_column, template, told_by
        self._id_option, self._text_option, self._template_option = (
            option_of_side(name, is_right) for name in ("id-column", "text-column", "template")
        )
        self._fields = template_fields(template, self._template_option)
        self._kinds: dict[str, str] = {}  # by file

    def look(self, shard: Shard, reader: ShardReader) -> None:
        """Looks for the id column and those of the template in one file.

        Raises:
            ConfigError: a column is missing (says where the template is from, and the way out), or of a type that
                cannot be used.
        """
        reader.check_columns([self._id_column], f"name the ids' column with {self._id_option}")
        self._kinds[shard.name] = check_id_type(reader.column_type(self._id_column), self._id_column)
        way_out = f"name the texts' column with {self._text_option}, or several with {self._template_option}"
        try:
            reader.check_columns(self._fields, "" if self._told_by else way_out)
        except ConfigError as error:
            if self._told_by is None:
                raise
            raise ConfigError(
                f"{error}. The template {self._template!r} comes from {self._told_by}, where export has recorded how "
                f"the texts were made that the encoder was trained with; pass {self._template_option} or "
                f"{self._text_option} to make others"
            ) from error
        for name in self._fields:
            as_text(pa.array([], reader.column_type(name)), name)

    def refuse_negative(self, records: Location, shards: Sequence[Shard], skip_bad_shards: bool) -> None:
        """Looks for negative ids, which cannot be told from the largest ones where another file has ids of uint64.

        Only in a table that has both is anything read.

        Args:
            records: root of the table.
            shards: those of its files that were looked at, or more.
            skip_bad_shards: whether those that cannot be read are passed over.

        Raises:
            InputError: there is one, or the ids cannot be read; names the file.
        """
        unsigned = min((name for name, kind in self._kinds.items() if kind == "uint64"), default=None)
        for shard in shards if unsigned is not None else ():
            if self._kinds.get(shard.name) != "int64":
                continue
            try:
                is_negative = self._has_negative(records, shard)
            except InputError:
                if not skip_bad_shards:
                    raise
                continue
            if is_negative:
                raise InputError(
                    f"column {self._id_column!r} has negative ids in {records.naming(shard.name)}, and is of type "
                    f"uint64 in {unsigned}; cast it to int64 there"
                )

    def _has_negative(self, records: Location, shard: Shard) -> bool:
        with ShardReader(records, shard, may_skip=True) as reader:
            batches = reader.all_batches([self._id_column], _BATCH_ROWS)
            chunks = (chunk for table in batches for chunk in table.column(0).chunks)
            return any((pc.min(decoded(chunk)).as_py() or 0) < 0 for chunk in chunks)

    @property
    def id_kind(self) -> str:
        """How the ids of all files are compared; see ``flipkd.vectors.id_types``.

        Raises:
            InputError: some files hold integers and others strings.
        """
        first_of_kind: dict[str, str] = {}
        for name in sorted(self._kinds):
            first_of_kind.setdefault(self._kinds[name], name)
        return common_kind(first_of_kind, self._id_column)
