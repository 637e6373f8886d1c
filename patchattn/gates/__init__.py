"""The head gate: for each (batch row, query head, query), does this head need the bulk keys?

Every kind of gate is a log mass of the bulk keys: exact (oracle), estimated (moments), or +inf / -inf for decisions
made beforehand. A gate closes where `local_log_mass - bulk_log_mass` reaches its margin, and opens where that can't be
said. Each kind is a file; `Gate` is all that has to know of it.
"""

from typing import Annotated

from pydantic import Field

from patchattn.gates.moment import MomentGate
from patchattn.gates.oracle import OracleGate
from patchattn.gates.static import ClosedGate, OpenGate, StaticGate

Gate = Annotated[MomentGate | OracleGate | StaticGate | OpenGate | ClosedGate, Field(discriminator="kind")]

__all__ = ["ClosedGate", "Gate", "MomentGate", "OpenGate", "OracleGate", "StaticGate"]
