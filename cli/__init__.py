"""The front door: one thin file a verb, imported when it is called, so that `query` never waits for torch."""

import importlib
import sys

import click

VERBS = ("compact", "dashboards", "demo", "doctor", "export", "fit", "query", "report", "serve", "watch")


class Verbs(click.Group):
    """Finds each verb in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f".{cmd_name}", __name__)
        command: click.Command = getattr(module, cmd_name)
        return command


@click.group(cls=Verbs, epilog="Example: eigenwatch demo")
@click.version_option(package_name="eigenwatch", prog_name="eigenwatch")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """How much of each feed-forward layer's width a training run really uses."""


def main() -> None:
    """Runs the command line: exit 0 done, 1 failed, 2 wrong usage; errors are one line."""
    debug = "--debug" in sys.argv[1:]
    try:
        sys.exit(cli(standalone_mode=False) or 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Aborted.", err=True)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        known = isinstance(error, ValueError)
        text = lines[0] if known else f"{type(error).__name__}: {lines[0]} (--debug shows where)"
        click.echo(f"Error: {text}", err=True)
        sys.exit(1)
