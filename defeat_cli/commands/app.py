"""The `defeat` command. Each subcommand turns its options into a call; heavy imports wait until one is chosen."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from defeat_cli import __version__
from defeat_cli.commands import ablate, check, convert, export, gradmap, predict, train
from defeat_cli.commands import eval as evaluation
from defeat_cli.console import console, errors
from defeat_cli.errors import DefeatError, Interrupted


class CleanErrors(TyperGroup):
    """Prints bad input, and what the system refuses (a full disk, no permission), as one message with exit code 2.

    Programming errors keep their traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DefeatError as error:
            errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has enough
                raise
            place = f"{error.filename}: " if error.filename else ""
            errors.print(f"[bold red]error:[/] {escape(f'{place}{error.strerror or error}')}", soft_wrap=True)
            raise typer.Exit(2) from None
        except Interrupted as stop:
            errors.print(f"[yellow]stopped:[/] {escape(str(stop))}", soft_wrap=True)
            raise typer.Exit(stop.code) from None
        except KeyboardInterrupt:
            errors.print("[yellow]stopped[/] at once", soft_wrap=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=CleanErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def defeat(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Distil a large object detector into a small one (DeFeat, CVPR 2021)."""


app.command("train")(train.train)
app.command("eval")(evaluation.evaluate)
app.command("ablate")(ablate.ablate)
app.command("gradmap", help="The same as visualize-gradients.")(gradmap.visualize_gradients)
app.command("visualize-gradients")(gradmap.visualize_gradients)
app.command("check")(check.check)
app.command("convert")(convert.convert)
app.command("predict")(predict.predict)
app.command("export")(export.export)


def main() -> None:
    """The console script."""
    app()
