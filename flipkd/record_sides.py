"""The record tables of a job's two sides, and how the records of each are read."""

from __future__ import annotations

from dataclasses import dataclass

from flipkd.errors import ConfigError


def option_of_side(name: str, is_right: bool) -> str:
    """How an option is called for a side: ``--id-column``, and ``--right-id-column`` for the right one."""
    return f"--right-{name}" if is_right else f"--{name}"


def text_template(template: str | None, text_column: str | None) -> str:
    """The template; a plain text column is the template of that column alone.

    Raises:
        ConfigError: the column's name has braces, which a template cannot say.
    """
    if template is None and text_column is not None and ("{" in text_column or "}" in text_column):
        raise ConfigError(f"--text-column {text_column!r}: a name with braces cannot be used; rename the column")
    return template if template is not None else f"{{{text_column or 'text'}}}"


def check_one_way(template: str | None, text_column: str | None, is_right: bool = False) -> None:
    """Refuses a template beside a text column other than the usual one: a text is made in one way.

    Raises:
        ConfigError: names both options.
    """
    if template is not None and text_column not in (None, "text"):
        names = " and ".join(option_of_side(name, is_right) for name in ("template", "text-column"))
        raise ConfigError(f"{names} both say how a record's text is made; give one of them")


@dataclass(frozen=True)
class RecordSide:
    """A record table, and how its records are read.

    Args:
        records: Parquet file or folder.
        id_column: the record's id.
        text_column: the record's text; not with ``template``.
        template: several columns as one text.
        is_right: whether ``--right-records`` names the table.
    """

    records: str
    id_column: str
    text_column: str | None
    template: str | None
    is_right: bool

    @property
    def text_template(self) -> str:
        """The template of the records' texts."""
        return text_template(self.template, self.text_column)


class RecordSides:
    """Of a configuration that names the records of both sides, or of the left and of the right side."""

    records: str | None
    right_records: str | None
    id_column: str
    text_column: str | None
    template: str | None
    right_id_column: str | None
    right_text_column: str | None
    right_template: str | None

    @property
    def record_sides(self) -> tuple[RecordSide, ...]:
        """The tables of the left and, where they differ, the right records; empty without record tables."""
        if self.records is None:
            return ()
        left = RecordSide(self.records, self.id_column, self.text_column, self.template, is_right=False)
        if self.right_records is None:
            return (left,)
        column, template = self.right_text_column, self.right_template
        if column is None and template is None:
            column, template = self.text_column, self.template
        return left, RecordSide(self.right_records, self.right_id_column or self.id_column, column, template, True)

    def check_record_sides(self, has_right: bool) -> None:
        """Refuses options of a right side that is not there.

        Args:
            has_right: whether the right side has a table (or a store) of its own.

        Raises:
            ConfigError: names the option.
        """
        check_one_way(self.template, self.text_column)
        check_one_way(self.right_template, self.right_text_column, is_right=True)
        if self.right_records is not None and self.records is None:
            raise ConfigError("--right-records needs --records")
        for name in ("right_id_column", "right_text_column", "right_template"):
            if getattr(self, name) is not None and not has_right:
                raise ConfigError(f"--{name.replace('_', '-')} needs --right-records")
