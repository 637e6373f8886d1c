"""Calls on which the paths of the flex backend are compared with the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from patchattn.backends import flex, reference
from patchattn.call.inputs import Attended, AttentionInputs
from patchattn.call.masses import exact_masses
from patchattn.call.regions import Regions
from patchattn.gates.decision import forced


@dataclass(frozen=True)
class Case:
    """One call; `pads` is the left padding per batch row, `holes` makes single keys padding as well."""

    heads: int = 6
    kv_heads: int = 2
    queries: int = 300
    keys: int = 300
    dim: int = 16
    value_dim: int = 16
    sink: int = 4
    window: int = 32
    pads: tuple[int, ...] = (0, 37)
    holes: bool = False
    query_slot: int | None = None
    softcap: float | None = None
    sink_logits: bool = False
    gates: Literal["mixed", "open", "closed", "blocks", "decided"] = "mixed"

    @property
    def graph(self) -> tuple[object, ...]:
        """What a graph is compiled for: cases that agree in it share one, whatever their lengths, padding and gates."""
        sizes = len(self.pads), self.heads, self.kv_heads, self.dim, self.value_dim, min(self.queries, 2)
        return *sizes, self.sink, self.window, self.softcap, self.sink_logits

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> AttentionInputs:
        """Draw the tensors, the same values for every dtype and device."""
        generator = torch.Generator().manual_seed(7)
        batch = len(self.pads)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        valid = torch.arange(self.keys) >= torch.tensor(self.pads)[:, None]
        if self.holes:
            valid &= torch.rand(valid.shape, generator=generator) > 0.2
            valid[:, 60:130] = False
        regions = Regions.of(
            valid.to(device),
            query_length=self.queries,
            sink_size=self.sink,
            window_size=self.window,
            query_slot=None if self.query_slot is None else torch.tensor(self.query_slot, device=device),
        )
        return AttentionInputs(
            draw(batch, self.heads, self.queries, self.dim),
            draw(batch, self.kv_heads, self.keys, self.dim),
            draw(batch, self.kv_heads, self.keys, self.value_dim),
            regions,
            self.dim**-0.5,
            self.softcap,
            draw(self.heads) if self.sink_logits else None,
        )

    def bulk_log_mass(self, inputs: AttentionInputs) -> torch.Tensor:
        """Gates of the case as a bulk log mass."""
        if self.gates == "decided":
            return exact_masses(inputs)[0].bulk
        shape = inputs.query.shape[:3]
        pairs = torch.full(shape, self.gates == "open")
        if self.gates == "mixed":
            pairs = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.3
            pairs[:, ::2, 0] = True
            pairs[:, 1::2, 0] = False
        if self.gates == "blocks":  # whole tiles open, whole tiles closed: full blocks
            pairs[:, :, shape[2] // 2 :] = True
        return forced(pairs.to(inputs.query.device), inputs)


CASES = {
    "gqa": Case(),
    "no group": Case(heads=2),
    "group of 4": Case(heads=4, kv_heads=1),
    "all open": Case(gates="open"),
    "all closed": Case(gates="closed"),
    "tiles of full blocks": Case(heads=2, queries=520, keys=520, gates="blocks"),
    "full blocks, group": Case(queries=300, keys=600, gates="blocks", pads=(0, 0)),
    "full blocks in the window": Case(heads=2, queries=900, keys=900, window=420, sink=140, pads=(0, 3)),
    "window ends before a tile": Case(heads=2, window=129, sink=0, pads=(0, 0), gates="closed"),
    "offset": Case(queries=70, keys=300),
    "static cache": Case(queries=70, keys=400, query_slot=200),
    "decode": Case(queries=1),
    "decode, static cache": Case(queries=1, keys=400, query_slot=230),
    "decode, no group": Case(queries=1, keys=600, heads=2),
    "decode, sinks": Case(queries=1, sink_logits=True),
    "softcap": Case(softcap=2.0),
    "sinks": Case(sink_logits=True),
    "sinks and softcap": Case(sink_logits=True, softcap=2.0, gates="decided"),
    "value dim": Case(dim=24, value_dim=40),
    "no sink": Case(sink=0),
    "window of one": Case(window=1, sink=0),
    "window of one, sink": Case(window=1, sink=3),
    "rows without keys": Case(pads=(300, 5), sink_logits=True, softcap=2.0),
    "holes": Case(holes=True, sink=0, window=20),
    "oracle": Case(gates="decided"),
    "one sequence": Case(pads=(0,), queries=150, keys=150),
    "no bulk": Case(queries=20, keys=20, pads=(0, 3), gates="open"),
}


def check(case: Case, compiler: flex.Compiler, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Attended:
    """Compare one call with the reference in float64, on the decisions of the float32 reference or its own."""
    inputs = case.inputs(dtype, device)
    bulk_log_mass = case.bulk_log_mass(inputs)
    got = flex.attend_with(inputs, bulk_log_mass, 0.5, compiler=compiler)
    plain = reference.attend(inputs, bulk_log_mass, 0.5)
    if case.gates == "decided":
        flips = (got.open != plain.open).float().mean().item()
        assert flips < 1e-3, f"{flips} of the decisions differ"
    else:
        assert torch.equal(got.open, plain.open)
    _check_gates(case, got, inputs)

    replayed = forced(got.open, inputs)
    plain = reference.attend(inputs, replayed, 0.0)
    wide = replace(inputs, query=inputs.query.double(), key=inputs.key.double(), value=inputs.value.double())
    truth = reference.attend(wide, replayed.double(), 0.0).output
    assert got.output.shape == truth.shape
    assert got.output.dtype == dtype
    assert got.output.isfinite().all()
    budget = 2 * ((plain.output - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max())
    error = (got.output - truth).abs().max()
    assert error <= budget, f"error {error.item():.2e} over the budget of {budget.item():.2e}"

    left_padding = inputs.regions.positions < 0
    assert not got.output.transpose(1, 2)[left_padding].any()
    assert got.scored_keys.shape == ()
    assert got.scored_keys.dtype == torch.int64
    assert got.scored_keys >= plain.scored_keys
    return got


def _check_gates(case: Case, got: Attended, inputs: AttentionInputs) -> None:
    asked = inputs.regions.asked[:, None].expand_as(got.open)
    n_open, n_closed = (asked & got.open).sum(), (asked & ~got.open).sum()
    if case.gates == "open":
        assert n_closed == 0
    elif case.gates == "closed":
        assert n_open == 0
        assert n_closed > 0
    else:
        assert n_open > 0, "no gate was open"
        assert n_closed > 0, "no gate was closed"
