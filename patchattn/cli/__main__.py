"""Make `python -m patchattn.cli` the same as `patchattn`."""

from patchattn.cli import main

main()
