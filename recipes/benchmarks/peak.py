"""The most memory that a call holds; without torch, for programs that have none use it too."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def resident_peak(call: Callable[[], Any]) -> float:
    """Return the largest resident set while a call runs above that before it, in MiB; NaN where Linux doesn't tell.

    Memory that was freed and not handed back is handed back first, otherwise the call would use it unseen.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = _kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError, TypeError):
        call()
        return float("nan")
    call()
    return (_kib("VmHWM") - before) / 1024


def _kib(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", _STATUS.read_text(), flags=re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1])
