"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Backend = Annotated[str, typer.Option(help="auto, blockwise, flex or reference.")]
Device = Annotated[str, typer.Option(help="Device of the model: cpu, cuda, cuda:1, mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
