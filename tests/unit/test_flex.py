"""The flex backend against the reference: the path of CUDA devices traced on CPU, and CPU through Inductor.

Inductor compiles for seconds and its failures can take the process down, so those cases run in processes of their own,
several in each.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchattn import ClosedGate, MomentGate
from patchattn.backends import flex, reference
from patchattn.backends.flex import compiled
from patchattn.backends.flex import masks as flex_masks
from patchattn.backends.flex.call import Settings, two_pass_call
from patchattn.backends.flex.local import local_log_mass
from patchattn.backends.flex.shared import Shared, has_full_list
from patchattn.call.inputs import Attended
from patchattn.call.masses import attention_scores, masked_log_mass
from patchattn.errors import BackendError, UnsupportedCallError
from patchattn.gates.base import Known
from patchattn.gates.measured import MeasuredHeads
from patchattn.moments.gaussian import CHUNK

sys.path.insert(0, str(Path(__file__).parent))

from flex_cases import CASES, Case, check


@pytest.fixture(scope="module", autouse=True)
def _fresh_compiler():
    trace = logging.getLogger("torch.__trace")
    propagate, trace.propagate = trace.propagate, False  # pytest would format and keep every line
    yield
    trace.propagate = propagate
    compiled.forget()
    torch.compiler.reset()


# Each of these is a graph of its own and differs from some other case in one thing.
MORE = {"group of 4", "softcap", "sinks", "no sink", "window of one", "window ends before a tile", "decode, no group"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in CASES]
)
def test_two_passes_equal_the_reference(name: str):
    check(CASES[name], "eager")


@pytest.mark.parametrize("name", ["gqa", "decode, sinks"])
def test_two_passes_survive_functionalisation(name: str):
    check(CASES[name], "aot_eager")


def test_bfloat16():
    check(Case(gates="decided"), "eager", torch.bfloat16)


def test_infinite_and_nan_gates():
    case = Case()
    inputs = case.inputs(torch.float32)
    mass = torch.full(inputs.query.shape[:3], torch.nan)
    mass[:, :3] = -torch.inf
    got = flex.attend_with(inputs, mass, 0.0, compiler="eager")
    asked = inputs.regions.asked[:, None]
    assert torch.equal(got.open[:, 3:], asked.expand(-1, 3, -1))
    assert not got.open[:, :3].any()
    assert asked.any()


def test_closed_calls_score_fewer_keys():
    scored = {gates: int(check(Case(keys=600, gates=gates), "eager").scored_keys) for gates in ("open", "closed")}
    assert scored["closed"] < scored["open"]
    # Scattered open pairs cost as much as they are many, up to whole tiles: 30% here, and the local keys.
    scattered = {
        gates: int(check(Case(heads=2, queries=1500, keys=1500, gates=gates), "eager").scored_keys)
        for gates in ("open", "mixed", "closed")
    }
    share = (scattered["mixed"] - scattered["closed"]) / (scattered["open"] - scattered["closed"])
    assert 0.2 < share < 0.45
    # Decode with closed gates reads the blocks of sink and window only: 6 heads, at most 2 + 1 blocks of 128, 2 rows.
    decode = check(Case(keys=2000, queries=1, gates="closed", pads=(0, 0)), "eager")
    assert decode.scored_keys <= 2 * 6 * 3 * 128


def test_lengths_are_dynamic():
    torch.compiler.reset()
    compiled.forget()
    torch._dynamo.utils.counters.clear()
    for keys in range(200, 1000, 190):
        check(Case(queries=1, keys=keys), "eager")
        check(Case(queries=keys // 2, keys=keys), "eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


WEIGHED = {name: case for name, case in CASES.items() if name.startswith("decode") and not case.sink_logits} | {
    "long": Case(queries=1, keys=700, pads=(0, 90)),
    "softcap": Case(queries=1, keys=700, softcap=2.0),
    "sinks": Case(queries=1, keys=700, sink_logits=True),
    "no chunk is full": Case(queries=1, keys=100, pads=(0, 3)),
    "prefill": Case(queries=700, keys=700, pads=(0, 90)),
    "prefill, holes": Case(queries=700, keys=700, holes=True),
    "prefill goes on": Case(queries=310, keys=700, pads=(0, 90), softcap=2.0),
    "prefill, static cache": Case(queries=310, keys=900, query_slot=390),
}


@pytest.mark.parametrize("name", WEIGHED)
@pytest.mark.parametrize("slab", [pytest.param(4096, marks=pytest.mark.slow), 128])
def test_weighing_in_the_graph_equals_weighing_before_it(name: str, slab: int, monkeypatch: pytest.MonkeyPatch):
    """With moments up to the first query, with those of a chunk before, with none, and with margins of heads."""
    monkeypatch.setattr("patchattn.backends.flex.call.SLAB", slab)
    case = WEIGHED[name]
    inputs = case.inputs(torch.float32)
    gate, heads = MomentGate(threshold=0.6), inputs.query.shape[1]
    measured = MeasuredHeads(torch.linspace(-1, 1, heads))
    begin = int(inputs.regions.query_slot)
    for behind, margins in ((1, None), (1, measured), (CHUNK, None), (0, None)):
        moments = None
        if case.queries < case.keys and behind:
            regions = replace(inputs.regions, query_length=1, query_slot=torch.tensor(begin - behind))
            _, moments = gate.weigh(replace(inputs, query=inputs.query[:, :, :1], regions=regions), Known())
        found = flex.weigh_and_attend_with(inputs, gate, Known(0, moments, 1, margins), compiler="eager")
        assert found is not None
        got, after = found
        mass, then = gate.weigh(inputs, Known(0, moments, None, margins))
        want = flex.attend_with(inputs, mass, gate.margin, compiler="eager")
        flips = (got.open != want.open).float().mean()
        assert flips < 1e-3, f"{flips} of the decisions differ"
        if not flips:
            assert got.scored_keys == want.scored_keys
            torch.testing.assert_close(got.output, want.output, rtol=1e-5, atol=1e-6)
        begun = then.chunks > 0  # before the first chunk is full there is no reference yet
        assert torch.equal(after.chunks, then.chunks)
        for part, expected in zip(after.parts, then.parts, strict=True):
            torch.testing.assert_close(part[begun], expected[begun], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["long", "prefill", "prefill goes on", "prefill, static cache"])
@pytest.mark.parametrize("slab", [pytest.param(4096, marks=pytest.mark.slow), 128])
def test_a_probe_in_the_graph_decides_as_before_it(name: str, slab: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("patchattn.backends.flex.call.SLAB", slab)
    inputs, gate = WEIGHED[name].inputs(torch.float32), MomentGate(threshold=0.6)
    found = flex.weigh_and_attend_with(inputs, gate, probed(inputs), compiler="eager")
    assert found is not None
    mass, _ = gate.weigh(inputs, probed(inputs))
    want = flex.attend_with(inputs, mass, gate.margin, compiler="eager")
    asked = inputs.regions.asked[:, None].expand_as(want.open)
    assert 0.05 < want.open[asked].float().mean() < 0.95
    assert (found[0].open != want.open).float().mean() < 1e-3


def probed(inputs) -> Known:
    """Margins and a probe, and hidden states for it to read."""
    generator = torch.Generator().manual_seed(3)
    heads, hidden = inputs.query.shape[1], torch.randn(len(inputs.query), 1000, 24, generator=generator)
    probe = torch.randn(heads, 24, generator=generator)
    measured = MeasuredHeads(torch.linspace(-2, 1, heads), probe=probe)
    return Known(0, measured=measured, hidden=hidden[:, : inputs.query.shape[2]])


def test_a_probe_takes_no_graph_for_each_length(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("patchattn.backends.flex.call.SLAB", 128)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for length in (200, 300, 460, 700):
        inputs = Case(queries=length, keys=length).inputs(torch.float32)
        assert flex.weigh_and_attend_with(inputs, MomentGate(threshold=0.6), probed(inputs), compiler="eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("behind", [4600, -200])
def test_moments_that_lag_or_run_ahead_are_brought_up_to_the_first_query(behind: int):
    """Calls that kept none came between, or keys were taken back."""
    gate, case = MomentGate(threshold=0.3), Case(heads=2, queries=10, keys=7000, window=2000, query_slot=6700)
    inputs = case.inputs(torch.float32)
    regions = replace(inputs.regions, query_length=1, query_slot=torch.tensor(6700 - behind))
    _, kept = gate.weigh(replace(inputs, query=inputs.query[:, :, :1], regions=regions), Known())
    found = flex.weigh_and_attend_with(inputs, gate, Known(moments=kept), compiler="eager")
    assert found is not None
    mass, then = gate.weigh(inputs, Known(moments=kept))
    want = flex.attend_with(inputs, mass, gate.margin, compiler="eager")
    assert want.open.any()
    assert not want.open.all()
    assert torch.equal(found[0].open, want.open)
    assert torch.equal(found[1].chunks, then.chunks)


def test_some_calls_are_weighed_before_the_graph():
    gate, inputs = MomentGate(), Case(queries=1, keys=700).inputs(torch.float32)
    moments = gate.weigh(inputs, Known())[1]
    weighed = functools.partial(flex.weigh_and_attend_with, compiler="eager")
    assert weighed(inputs, gate, Known(moments=moments)) is not None
    assert weighed(inputs, gate, Known()) is not None
    assert weighed(inputs, ClosedGate(), Known(moments=moments)) is None
    assert weighed(inputs, MomentGate(moments="calibration"), Known(moments=moments)) is None
    assert flex.weigh_and_attend(inputs, gate, Known(moments=moments)) is None, "a CPU goes in one pass"


@pytest.mark.parametrize("weighed", [False, True])
def test_backward_is_refused(weighed: bool):
    inputs = Case().inputs(torch.float32)
    inputs.query.requires_grad_()
    inputs.key.requires_grad_()
    mass = torch.full(inputs.query.shape[:3], torch.inf)

    def attend() -> Attended:
        if not weighed:
            return flex.attend_with(inputs, mass, 0.0, compiler="eager")
        found = flex.weigh_and_attend_with(inputs, MomentGate(), Known(), compiler="eager")
        assert found is not None
        assert not any(part.requires_grad for part in found[1].parts)
        return found[0]

    got = attend()
    assert got.output.requires_grad
    with pytest.raises(UnsupportedCallError, match="no_grad"):
        got.output.sum().backward()
    with torch.no_grad():
        assert not attend().output.requires_grad


def test_float64_is_refused():
    inputs = Case().inputs(torch.float64)
    with pytest.raises(BackendError, match="blockwise"):
        flex.attend(inputs, torch.zeros(inputs.query.shape[:3]), 0.0)


def test_nothing_runs_uncompiled():
    inputs = Case().inputs(torch.float32)
    with torch.compiler.set_stance("force_eager"), pytest.raises(BackendError, match="uncompiled"):
        flex.attend(inputs, torch.zeros(inputs.query.shape[:3]), 0.0)


def failed_compilation(compiler) -> str:
    """Compile the path of CUDA devices for the CPU, which fails; returns what the error says."""
    case = Case(pads=(0,), queries=20)
    inputs = case.inputs(torch.float32)
    call, settings = two_pass_call(inputs, case.bulk_log_mass(inputs)), Settings.of(inputs, two_passes=True)
    run = compiled.compiled_call(settings, compiler, ())
    with pytest.raises(BackendError, match="blockwise") as error, compiled.explained(call):
        run(call, _masks_of(case)[1], torch.zeros(()))
    return str(error.value)


def test_a_failed_compilation_says_why():
    def refuse(module, inputs):
        raise RuntimeError("\n".join(["kernel 7 is wrong", *map(str, range(100)), "because of its stride"]))

    said = failed_compilation(refuse)
    assert "query [1, 6, 20, 16], key [1, 2, 300, 16], value [1, 2, 300, 16], torch.float32 on cpu" in said
    assert "kernel 7 is wrong" in said
    assert "because of its stride" in said
    assert len(said.splitlines()) < 20
    assert "TORCHDYNAMO" not in said


@pytest.mark.slow
def test_a_failed_lowering_says_why():
    """Inductor has no kernel for CPU that returns a log-sum-exp."""
    said = run_in_process("""
        from test_flex import failed_compilation
        print(failed_compilation("inductor"))
    """)
    assert "`return_lse` is not supported" in said
    assert "target: flex_attention" in said
    assert "TensorBox" not in said


@pytest.mark.parametrize("name", ["gqa", "holes", "static cache", "softcap", "sinks", "no sink"])
def test_plain_local_log_mass(name: str):
    inputs = CASES[name].inputs(torch.float32)
    regions = inputs.regions
    got = local_log_mass(
        inputs.query,
        inputs.key,
        regions.valid,
        regions.first,
        regions.query_slot,
        regions.sink_size,
        regions.window_size,
        inputs.scale,
        inputs.softcap,
    )
    want = masked_log_mass(attention_scores(inputs), regions.local_mask()[:, None], None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("part", ["local", "bulk", "both"])
def test_block_lists_cover_the_token_mask(name: str, part: str):
    """Listed blocks hold all attended keys, full blocks nothing else, and the token mask is that of the reference."""
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    regions, block = inputs.regions, 128
    opened = reference.attend(inputs, case.bulk_log_mass(inputs), 0.5).open
    masks, shared = _masks_of(case)
    rows_open = compiled.rows_of(opened, case.kv_heads)
    ends = flex_masks.bulk_end(rows_open, masks.slots, case.window)
    in_place = torch.arange(rows_open.shape[2]).expand(rows_open.shape) if has_full_list(rows_open.shape[2]) else None
    blocks = {
        "local": lambda: shared.local_mask(case.window, case.keys),
        "bulk": lambda: shared.bulk_mask(rows_open, in_place, case.window, case.keys)[0],
        "both": lambda: masks.both(ends, block=block, null_key=False)[0],
    }[part]()

    local = regions.local_mask()[:, None].expand(-1, case.heads, -1, -1)
    bulk = regions.bulk_mask()[:, None] & opened[..., None]
    want = compiled.rows_of({"local": local, "bulk": bulk, "both": local | bulk}[part], case.kv_heads)
    axes = [torch.arange(n) for n in want.shape]
    grid = [axis.view([-1 if i == j else 1 for j in range(4)]) for i, axis in enumerate(axes)]
    # The bulk pass drops what it finds for closed rows, so they may read anything.
    kept = rows_open[..., None] if part == "bulk" else torch.tensor(True)
    assert torch.equal((blocks.mask_mod(*grid) & kept).expand_as(want), want)

    rows, keys = want.shape[2:]
    tile_of, block_of = torch.arange(rows) // flex_masks.ROW_TILE, torch.arange(keys) // block
    partial = _listed(blocks.kv_num_blocks, blocks.kv_indices)[:, :, tile_of][..., block_of].expand_as(want)
    full = torch.zeros_like(partial)
    if blocks.full_kv_num_blocks is not None:
        lists = _listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
        full = lists[:, :, tile_of][..., block_of].expand_as(want)
    assert not (partial & full).any()
    assert not (want & ~partial & ~full).any()
    assert not (full & ~want & kept).any()
    if "full blocks" in name and part in ("both", "local" if "window" in name else "bulk"):
        assert full.any()


def _masks_of(case: Case) -> tuple[flex_masks.RowMasks, Shared]:
    inputs = case.inputs(torch.float32)
    regions, sizes = inputs.regions, {"sink_size": case.sink, "window_size": case.window}
    tensors = regions.valid, regions.first, regions.query_slots
    masks = flex_masks.RowMasks.of(*tensors, group=inputs.group_size, **sizes)
    settings = Settings.of(inputs, two_passes=True)
    asked = regions.asked, regions.unasked
    return masks, Shared.of(settings, *tensors, *asked, heads=case.heads, kv_heads=case.kv_heads)


def _listed(counts: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Turn lists of blocks into [batch, heads, tiles, blocks] bool."""
    used = torch.arange(index.shape[-1]) < counts[..., None]
    return torch.zeros(index.shape, dtype=torch.int64).scatter_add(-1, index.long(), used.long()) > 0


@pytest.mark.parametrize("name", ["gqa", "all open", "all closed", "full blocks, group", "oracle"])
def test_open_rows_come_first(name: str):
    """Both parts keep their order, and the bulk pass visits only the tiles that open rows fill."""
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    opened = compiled.rows_of(reference.attend(inputs, case.bulk_log_mass(inputs), 0.5).open, case.kv_heads)
    order, place = flex_masks.open_first(opened)
    rows = torch.arange(opened.shape[2]).expand(opened.shape)
    assert torch.equal(order.gather(2, place), rows)
    moved = opened.gather(2, order)
    n_open = opened.sum(2, keepdim=True)
    assert torch.equal(moved, rows < n_open)
    ascends = order.diff(dim=2) > 0
    ascends.scatter_(2, (n_open - 1).clamp(0, rows.shape[2] - 2), True)  # where the closed rows begin
    assert ascends.all()

    blocks, _ = _masks_of(case)[1].bulk_mask(opened, order, case.window, case.keys)
    visited = (blocks.kv_num_blocks + blocks.full_kv_num_blocks) > 0
    tiles = torch.arange(visited.shape[2])
    assert torch.equal(visited, tiles * flex_masks.ROW_TILE < n_open)


@pytest.mark.parametrize("name", ["gqa", "full blocks, group", "sinks and softcap", "static cache"])
def test_slabs_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    """Queries in slabs of 64, the last one shorter."""
    whole = check(CASES[name], "eager")
    monkeypatch.setattr("patchattn.backends.flex.call.SLAB", 64)
    slabs = check(CASES[name], "eager")
    torch.testing.assert_close(slabs.output, whole.output, rtol=1e-5, atol=1e-5)
    assert torch.equal(slabs.open, whole.open)


@pytest.mark.parametrize("keys", [2**12, 2**17, 2**20])
def test_block_lists_stay_small(keys: int):
    block = flex_masks.block_size(1, 8, 4 * min(keys, 2**17), keys)
    tiles = 4 * min(keys, 2**17) // flex_masks.ROW_TILE
    assert 2 * 8 * tiles * (keys // block) * 4 <= 16 * 2**20


def run_in_process(code: str, timeout: int = 300) -> str:
    """Run code where the tests and the package can be imported; returns what it printed."""
    tests, root = Path(__file__).parent, Path(flex.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(root)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ["gqa", "all open", "all closed", "oracle"],
        ["sinks and softcap", "rows without keys", "tiles of full blocks"],
        ["decode", "decode, static cache", "decode, no group", "decode, sinks"],
    ],
    ids=["prefill", "features", "decode"],
)
def test_inductor_on_cpu_equals_the_reference(names: list[str]):
    run_in_process(f"""
        from flex_cases import CASES, check
        for name in {names}:
            check(CASES[name], "inductor")
    """)


@pytest.mark.slow
def test_inductor_bfloat16_and_use_inside_a_compiled_function():
    run_in_process("""
        import torch
        from flex_cases import Case, check
        from patchattn.backends import reference
        from patchattn.backends import flex

        check(Case(dim=24, value_dim=40), "inductor", torch.bfloat16)

        inputs = Case().inputs(torch.float32)
        mass = Case().bulk_log_mass(inputs)

        def outer(query):
            same = type(inputs)(query * 1.0, inputs.key, inputs.value, inputs.regions, inputs.scale)
            got = flex.attend(same, mass, 0.0)
            return got.output + 1.0, got.open

        output, opened = torch.compile(outer, fullgraph=True)(inputs.query)
        want = reference.attend(inputs, mass, 0.0)
        assert torch.equal(opened, want.open)
        torch.testing.assert_close(output - 1.0, want.output, rtol=1e-5, atol=1e-5)
    """)


@pytest.mark.slow
def test_growing_decode_compiles_once_per_doubling_and_the_recompile_limit_is_an_error():
    run_in_process("""
        import pytest, torch
        from flex_cases import Case, check
        from patchattn.errors import BackendError

        count = torch._dynamo.utils.counters["stats"]
        for keys in range(300, 1000, 71):
            check(Case(queries=1, keys=keys), "inductor")
        assert count["unique_graphs"] == 2, count  # up to 512 and 1,024 keys

        with torch._dynamo.config.patch(recompile_limit=1):
            for _ in range(2):
                with pytest.raises(BackendError, match="recompile_limit"):
                    check(Case(queries=1, keys=1500), "inductor")
            check(Case(queries=1, keys=300), "inductor")
    """)
