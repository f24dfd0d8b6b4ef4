"""`kvpleat report`: an HTML page from the files that `kvpleat eval` and `kvpleat bench` wrote."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kvpleat.bench import report as reports
from kvpleat.cli.command import command
from kvpleat.errors import OptionError


@command
def report(
    files: Annotated[list[Path], typer.Argument(help="Files of kvpleat eval and kvpleat bench, of one model.")],
    out: Annotated[Path, typer.Option(help="HTML page to write.")],
    markdown: Annotated[Path | None, typer.Option(help="File for the tables as GitHub markdown.")] = None,
) -> None:
    """Write one self-contained HTML page (and a markdown table) from result files."""
    results = reports.read(files)
    _write(out, reports.page(results))
    typer.echo(str(out))
    if markdown is not None:
        _write(markdown, reports.markdown(results))
        typer.echo(str(markdown))


def _write(path: Path, text: str) -> None:
    """Put the file in place once it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OptionError(f"{path} cannot be written ({error}), so there is no report. Pass another place.") from error
