"""``export``."""

from __future__ import annotations

import click

from flipkd.cli.guard import OneValueCommand
from flipkd.cli.options import common_options, print_values, set_up_logging


@click.command(cls=OneValueCommand)
@click.option("--run", required=True, help="Folder of a finished training run.")
@click.option("--output", required=True, help="Folder of the encoder (local).")
@click.option("--student", help="Folder of the student's base, if it has moved since the training.")
@click.option("--template", help="The records' template, as in '{name} | {address}'; recorded in flipkd.json.")
@click.option("--overwrite", is_flag=True, help="Replace an older encoder.")
@click.option("--trust-remote-code", is_flag=True, help="Let Python code in the base's folder run.")
@common_options
def export(
    as_json: bool,
    log_level: str,
    run: str,
    output: str,
    student: str | None,
    template: str | None,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    """Turn a trained student into an encoder.

    Encode, score, sentence-transformers and vLLM load its folder.
    """
    set_up_logging(log_level)
    from flipkd.models.export import export as run_export

    found = run_export(
        run, output, base=student, template=template, overwrite=overwrite, trust_remote_code=trust_remote_code
    )
    if as_json:
        print_values(found, as_json)
        return
    lowest = found["tolerance"]
    click.echo(
        f"export: {found['layer']} blocks, {found['dimension']} dimensions, {found['size_bytes'] / 1e6:.0f} MB; "
        f"lowest cosine to the student over {found['checked_texts']} texts "
        f"{lowest['float32']:.6f} (float32), {lowest['bf16']:.4f} (bf16); in {found['output']}"
    )
