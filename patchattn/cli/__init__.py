"""The command `patchattn`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, or say how to install what it needs."""
    try:
        from patchattn.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich", "click"}:
            raise
        sys.stderr.write(
            f"The command patchattn needs the package {error.name!r}, which is not installed.\n"
            '  Fix: pip install "patchattn[demo]"\n'
        )
        sys.exit(2)
    app()
