"""``--help`` with examples that parse, ``--version``, and what a shell completes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.cli.help import COMPLETION, EXAMPLES, PATHS
from jobs.nightly import nightly

COMMANDS = sorted(main.commands)
PROGRAMS: dict[str, click.Command] = {**main.commands, "nightly": nightly}


def lines_of(name: str) -> list[str]:
    """The examples of a command, each in one line."""
    return EXAMPLES[name].strip().replace("\\\n", " ").splitlines()


def complete(*words: str) -> list[str]:
    """What bash is offered for the last of the words."""
    environment = {
        "_FLIPKD_BATCH_COMPLETE": "bash_complete",
        "COMP_WORDS": shlex.join(["flipkd-batch", *words]),
        "COMP_CWORD": str(len(words)),
    }
    return CliRunner().invoke(main, prog_name="flipkd-batch", env=environment).output.splitlines()


@pytest.mark.parametrize(("name", "line"), [(name, line) for name in COMMANDS for line in lines_of(name)])
def test_an_example_parses(name: str, line: str) -> None:
    program, command, *arguments = shlex.split(line)
    assert (program, command) == ("flipkd-batch", name)
    main.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("line", lines_of("nightly"))
def test_an_example_of_a_night_parses(line: str) -> None:
    program, script, *arguments = shlex.split(line)
    assert (program, script) == ("python", "jobs/nightly.py")
    nightly.make_context("nightly.py", arguments)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_shows_the_examples_as_they_are(name: str) -> None:
    found = CliRunner().invoke(PROGRAMS[name], ["--help"])
    assert found.exit_code == 0
    for line in EXAMPLES[name].strip().splitlines():
        assert line in found.output
    assert max(map(len, EXAMPLES[name].splitlines())) <= 112


def test_every_command_is_summed_up_in_one_line() -> None:
    listed = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*[^.]\.$", listed, re.MULTILINE), name  # three dots: cut off


def test_every_option_says_what_it_is_for() -> None:
    for name, command in PROGRAMS.items():
        options = [option for option in command.params if isinstance(option, click.Option)]
        untold = [option.opts for option in options if not option.help]
        assert not untold, name


def test_help_of_the_program_says_how_to_complete() -> None:
    assert COMPLETION in CliRunner().invoke(main, ["--help"]).output


def test_version() -> None:
    found = CliRunner().invoke(main, ["--version"])
    assert found.output == f"flipkd-batch, version {metadata.version('flipkd')}\n"


def test_every_text_option_that_is_a_path_is_known_as_one() -> None:
    for name, paths in PATHS.items():
        parameters = {parameter.name: parameter for parameter in PROGRAMS[name].params}
        for path in paths:
            assert isinstance(parameters[path].type, click.Path), (name, path)
        # Its help tells of a folder or file: then it must not be missing above.
        for parameter in parameters.values():
            told = (getattr(parameter, "help", None) or "").lower()
            if parameter.type is click.STRING and told.startswith(("folder", "parquet", "output", "text file")):
                pytest.fail(f"{name} --{parameter.name} reads like a path")


def test_words_that_bash_is_offered() -> None:
    assert complete("sc") == ["plain,score"]
    assert complete("score", "--right-") == [
        f"plain,--right-{word}"
        for word in ("column", "text", "store", "records", "id-column", "text-column", "template")
    ]
    assert complete("encode", "--dtype", "") == ["plain,int8", "plain,bf16", "plain,float32"]
    for words in (("score", "--pairs"), ("evaluate", "--labels"), ("encode", "--forget"), ("demo", "--output")):
        assert complete(*words, "da") == ["file,da"]
    assert complete("status", "sc") == ["file,sc"]
    assert complete("rescore", "--labels", "") == [""]  # two words, no path


def test_a_real_bash_completes(tmp_path: Path) -> None:
    program = tmp_path / "flipkd-batch"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.argv[0] = \'flipkd-batch\'; '
                       'from flipkd.cli import main; main()" "$@"\n')  # fmt: skip
    program.chmod(0o700)
    script = f"{COMPLETION}\nCOMP_WORDS=(flipkd-batch sc) COMP_CWORD=1\n_flipkd_batch_completion flipkd-batch\n"
    script += 'echo "${COMPREPLY[@]}"; complete -p flipkd-batch'
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.splitlines()[0] == "score"
    assert "_flipkd_batch_completion flipkd-batch" in found.stdout
