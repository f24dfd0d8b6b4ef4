"""What every command of `kvpleat` shares: the app, how a command is registered, and how its errors end."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer
from rich.console import Console

from kvpleat.errors import KvpleatError

P = ParamSpec("P")

app = typer.Typer(
    name="kvpleat",
    help="Compress the KV cache of transformers models while they run, and give the memory back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `kvpleat` command."""
    app()


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Register a command. Errors that kvpleat raises on purpose end it with 2 and one paragraph; Ctrl-C with 130."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except KvpleatError as error:
            Console(stderr=True).print(f"[bold red]error:[/] {plain(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return app.command(function.__name__.rstrip("_"))(guarded)


def plain(text: str) -> str:
    """Text with rich's markup escaped."""
    return text.replace("[", r"\[")
