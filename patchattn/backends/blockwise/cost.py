"""From how many bulk keys on a query is asked, and whether a prefill pays at all: a model of the call's time.

Time is counted in scores: what the fused kernel takes for one score of one head at head dimension 64. The constants are
measured; see docs/decisions/0003-break-even.md.
"""

from __future__ import annotations

from patchattn.backends.backend import NOT_ASKED, CallShape
from patchattn.policy import Phase

_DECODE = 8192

# Of 20 scores of bulk keys that an asked pair would read, 4 are read all the same: it may open.
_OF_20_SAVED = 16
# Scores that an asked pair costs beside its bulk: the gate, and what the local pass reads slower or more of than the
# dense kernel would, of which an eighth of the window is the part that grows with it.
_PAIR = 192
# Bulk keys from which a pair saves more than that by so much that it is worth its place in a call.
_LEAST = 256
# Scores that asking costs once for each call: small operations, shorter kernel calls, memory that is new. They do not
# get faster with more cores, so it is more than what one core was seen to take.
_CALL = 3_000_000


def break_even(shape: CallShape, phase: Phase) -> int:
    """Say from how many bulk keys on a query of a call is asked; see `Backend.break_even`."""
    if phase == "decode":
        return _DECODE
    least = _LEAST + shape.window_size // 8
    most = shape.keys - shape.sink_size - shape.window_size
    least_here = max(least, most - shape.queries + 1)
    n_asked = most - least_here + 1
    if n_asked <= 0:
        return NOT_ASKED
    # Sums over the queries asked, in whole numbers: their bulk keys are an arithmetic series.
    saved_of_40 = _OF_20_SAVED * (least_here + most) - 40 * (_PAIR + shape.window_size // 8)
    pairs = n_asked * shape.heads * shape.batch
    # The kernel's time per score grows with the head dimension, from a fifth of its value at 64.
    pays = saved_of_40 * pairs * (shape.dim + 16) > 40 * 80 * _CALL
    return least if pays else NOT_ASKED
