"""The `defeat` command. Each subcommand turns its options into a call; heavy imports wait until one is chosen."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from defeat_cli import __version__
from defeat_cli.commands import ablate, bench, check, convert, export, gradmap, init, predict, report, train
from defeat_cli.commands import eval as evaluation
from defeat_cli.commands.next_steps import next_steps
from defeat_cli.console import console, errors
from defeat_cli.errors import DefeatError, Ended, Interrupted
from defeat_cli.memory import shortage


class CleanErrors(TyperGroup):
    """Prints bad input, and what the system refuses (a full disk, no permission), as one message with exit code 2.

    Programming errors keep their traceback.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = list(args)  # the whole command line, for a command that starts itself several times
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Ended:
            raise typer.Exit(1) from None
        except Interrupted as stop:
            errors.print(f"[yellow]stopped:[/] {escape(str(stop))}", soft_wrap=True)
            raise typer.Exit(stop.code) from None
        except KeyboardInterrupt:
            errors.print("[yellow]stopped[/] at once", soft_wrap=True)
            raise typer.Exit(130) from None
        except Exception as error:
            message = _explained(error)
            if message is None:
                raise
            errors.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
            raise typer.Exit(2) from None


def _explained(error: Exception) -> str | None:
    """The one message of an error that is no programming error; None where it is one."""
    if isinstance(error, DefeatError):
        return str(error)
    if (reason := shortage(error)) is not None:
        return f"out of memory: {reason}"
    if isinstance(error, OSError) and error.errno != errno.EPIPE:  # then, whoever read our output has enough
        return f"{error.filename}: {error.strerror or error}" if error.filename else str(error.strerror or error)
    return None


app = typer.Typer(
    cls=CleanErrors,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def defeat(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Distil a large object detector into a small one (DeFeat, CVPR 2021)."""
    if ctx.invoked_subcommand is None:
        console.print(f"Distil a large object detector into a small one:\n{next_steps()}", markup=False, soft_wrap=True)


def _help(command: Callable[..., None]) -> str:
    """A command's docstring, each paragraph in one line, so that the terminal breaks it where it is full.

    `python -OO` leaves docstrings out.
    """
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (inspect.getdoc(command) or "").split("\n\n"))


COMMANDS = {
    "train": train.train,
    "init": init.init,
    "eval": evaluation.evaluate,
    "ablate": ablate.ablate,
    "gradmap": gradmap.visualize_gradients,
    "visualize-gradients": gradmap.visualize_gradients,
    "check": check.check,
    "bench": bench.bench,
    "convert": convert.convert,
    "predict": predict.predict,
    "export": export.export,
    "report": report.report,
}
for _name, _command in COMMANDS.items():
    app.command(_name, help=_help(_command) if _name != "gradmap" else "The same as visualize-gradients.")(_command)


def main() -> None:
    """The console script."""
    app()
