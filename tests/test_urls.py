"""What messages and logs show of a URL that holds a key."""

from __future__ import annotations

import logging

import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.logs import LOG_FORMATS, LogFormat, LogOptions, logging_to_stderr
from flipkd.urls import hide_secrets, without_secrets


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s3://KEY:SEC%2FRET@bucket/a@b/c:d", "s3://***@bucket/a@b/c:d"),
        ("s3://KEY:SEC/RET@bucket/a", "s3://***@bucket/a"),
        ("sftp://user:p@ss@host:22/a", "sftp://***@host:22/a"),
        ("abfs://box@account/a?sig=S%3D&api=1&account_KEY=S", "abfs://box@account/a?sig=***&api=1&account_KEY=***"),
        ("sftp://host:22/a@b", "sftp://host:22/a@b"),
        ("s3://bucket/a@b/c:d?region=x", "s3://bucket/a@b/c:d?region=x"),
        ("/data/a:b@c?key=d", "/data/a:b@c?key=d"),
    ],
)
def test_messages_show_no_key_of_a_bucket(address: str, told: str) -> None:
    assert without_secrets(address) == told


def test_every_url_of_a_message() -> None:
    message = "cannot read 'a.parquet' of s3://K:S1@b/a and s3://K:S2@b/c?token=S3&x=1; at https://example.org:80/@x"
    shown = "cannot read 'a.parquet' of s3://***@b/a and s3://***@b/c?token=***&x=1; at https://example.org:80/@x"
    assert hide_secrets(message) == shown


@pytest.mark.parametrize("form", LOG_FORMATS)
def test_logs_show_no_key(form: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr(LogOptions("info", form)):
        logging.getLogger("library").info("reading %s", "s3://KEY:SECRET@bucket/a")
    told = capsys.readouterr().err
    assert "SECRET" not in told
    assert "reading s3://***@bucket/a" in told


@pytest.mark.parametrize(
    "command",
    ["status URL", "score --store URL --pairs URL --output out", "encode --encoder URL --records URL --output out",
     "evaluate --scores URL --output out", "train --student URL --pairs URL --output out"],
)  # fmt: skip
def test_commands_show_no_key(command: str) -> None:
    done = CliRunner().invoke(main, command.replace("URL", "nosuch://KEY:SECRET@bucket/a").split())
    assert done.exit_code != 0
    assert "SECRET" not in done.output
    assert "***@bucket/a" in done.output
