"""All commands. Each is a function of a file of this folder, whose arguments are its options."""

from __future__ import annotations

import typer

from patchattn.cli.calibrate import calibrate
from patchattn.cli.calibrations import card, inspect, pull, push
from patchattn.cli.demo import demo
from patchattn.cli.doctor import doctor
from patchattn.cli.evaluate import evaluate
from patchattn.cli.problems import explained
from patchattn.cli.serve import serve

app = typer.Typer(
    name="patchattn",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def about() -> None:
    """Selective long-context attention: each head decides for each query whether it reads far keys.

    Start with **patchattn demo**, which compares dense and patched attention on a small model that ships with the
    package. If something looks wrong, **patchattn doctor** says what works on this machine.
    """


for command in (demo, doctor, evaluate, serve, calibrate, inspect, push, pull, card):
    app.command()(explained()(command))
