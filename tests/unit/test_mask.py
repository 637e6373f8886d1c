"""The mask that is not written out: whatever is asked of it, it is the mask of the model's own implementation."""

import copy

import pytest
import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from patchattn.call.regions import Regions
from patchattn.errors import ShapeError, UnsupportedCallError
from patchattn.hf.architecture import ORIGINALS
from patchattn.hf.attention import register
from patchattn.hf.mask import CausalMask, mask
from patchattn.testing import tiny_model

IMPLEMENTATIONS = ("sdpa", "eager")
PADDING = {
    "none": None,
    "left": torch.tensor([[1] * 9, [0] * 4 + [1] * 5]),
    "right": torch.tensor([[1] * 9, [1] * 5 + [0] * 4]),
    "between": torch.tensor([[1] * 9, [0, 1, 1, 0, 0, 1, 1, 1, 1]]),
}


def arguments(implementation, padding, *, queries=4, keys=9, offset=None, function=causal_mask_function):
    config = copy.deepcopy(tiny_model("llama").config)
    config._attn_implementation_internal = ORIGINALS[implementation]
    return {
        "batch_size": 2,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": keys - queries if offset is None else offset,
        "kv_offset": 0,
        "mask_function": function,
        "attention_mask": None if padding is None else padding.bool(),
        "allow_is_causal_skip": False,
        "dtype": torch.float32,
        "config": config,
        "use_vmap": False,
        "device": torch.device("cpu"),
    }


def both(implementation, padding, **fields):
    register()
    given = arguments(implementation, padding, **fields)
    return mask(**given), ALL_MASK_ATTENTION_FUNCTIONS[implementation](**given)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.fixture(params=PADDING)
def padding(request):
    return PADDING[request.param]


CUTS = {
    "last rows": (slice(None), slice(None), slice(-2, None), slice(None)),
    "first rows": (slice(None), slice(None), slice(2)),
    "one row": (slice(None), slice(None), slice(1, 2)),
    "first keys": (..., slice(7)),
    "rows and keys": (slice(None), slice(None), slice(1, 3), slice(8)),
    "every": (slice(None),),
}
OTHER = {
    "a row": (slice(None), slice(None), 0),
    "last keys": (..., slice(-3, None)),
    "steps": (slice(None), slice(None), slice(None, None, 2)),
    "a batch row": (slice(1, 2),),
    "new axis": (slice(None), None),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_mask_is_the_stock_mask_cut(implementation, padding, cut):
    made, stock = both(implementation, padding)
    here = made[CUTS[cut]]
    assert isinstance(here, CausalMask)
    assert torch.equal(here.written_out(), stock[CUTS[cut]])
    assert here.shape == stock[CUTS[cut]].shape
    assert torch.equal(here[:, :, -1:].written_out(), stock[CUTS[cut]][:, :, -1:])


@pytest.mark.parametrize("cut", CUTS)
def test_regions_of_a_cut_mask_are_those_of_its_queries(padding, cut):
    made, _ = both("sdpa", padding)
    begin = {"first rows": 0, "last rows": 2, "one row": 1, "rows and keys": 1}.get(cut, 0)
    here = made[CUTS[cut]]
    _, _, queries, keys = here.shape
    regions = here.regions(1, 2, torch.zeros(2, 6, queries, 4), torch.zeros(2, 2, keys, 4))
    valid = torch.ones(2, 9) if padding is None else padding
    want = Regions.of(valid[:, :keys], query_length=queries, sink_size=1, window_size=2, query_slot=5 + begin)
    for name in ("valid", "first", "query_slot", "query_slots", "n_bulk", "asked", "unasked"):
        assert torch.equal(getattr(regions, name), getattr(want, name)), name
    assert regions.host == want.host


@pytest.mark.parametrize("index", OTHER)
def test_any_other_index_gives_the_stock_mask(implementation, padding, index):
    made, stock = both(implementation, padding)
    got = made[OTHER[index]]
    assert type(got) is torch.Tensor
    assert torch.equal(got, stock[OTHER[index]])


SCORES = torch.randn(2, 6, 4, 9, generator=torch.Generator().manual_seed(0))
ASKED = {
    "added": lambda m: SCORES + m.float(),
    "added to": lambda m: m + SCORES,
    "right operand": lambda m: SCORES * m,
    "converted": lambda m: m.to(torch.float64),
    "divided": lambda m: m / 2.0,
    "converted by name": lambda m: m.to(dtype=torch.bfloat16),
    "compared": lambda m: m != 0,
    "in a function": lambda m: torch.cat([m, m], dim=1),
    "in another": lambda m: torch.where(m == 0, SCORES, 0),
    "masked fill": lambda m: SCORES.masked_fill(m == 0, -1.0),
    "dtype": lambda m: torch.zeros((), dtype=m.dtype),
    "expanded": lambda m: m.expand(-1, 6, -1, -1),
    "all": lambda m: m.all(),
    "sdpa": lambda m: torch.nn.functional.scaled_dot_product_attention(
        SCORES, SCORES[:, :, :1].expand(-1, -1, 9, -1), SCORES[:, :, :1].expand(-1, -1, 9, -1), attn_mask=m
    ),
}


@pytest.mark.parametrize("asked", ASKED)
def test_whatever_is_asked_of_it_is_asked_of_the_stock_mask(implementation, padding, asked):
    made, stock = both(implementation, padding)
    got, want = ASKED[asked](made), ASKED[asked](stock)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "change", [lambda m: m.__setitem__((..., 0), False), lambda m: m.masked_fill_(m == 0, 0), lambda m: m.zero_()]
)
def test_a_change_in_place_is_refused(change):
    made, _ = both("sdpa", PADDING["left"])
    with pytest.raises(UnsupportedCallError, match=r"in place.*\n.*make a new mask"):
        change(made)
    assert type(torch.where(made == 0, False, made)) is torch.Tensor


def test_what_moves_or_copies_a_mask_keeps_it(implementation, padding):
    made, stock = both(implementation, padding)
    for same in (made.contiguous(), made.clone(), made.detach(), made.to("cpu"), made.to(torch.device("cpu"))):
        assert isinstance(same, CausalMask)
        assert torch.equal(same.written_out(), stock)
    assert (made.ndim, made.dim(), made.size(), made.size(-1), len(made)) == (4, 4, stock.size(), 9, 2)
    assert made.device == stock.device
    query, key = (torch.zeros(2, heads, length, 4, device="meta") for heads, length in ((6, 4), (2, 9)))
    moved = made.to("meta").regions(1, 2, query, key)
    assert {part.device.type for part in (moved.valid, moved.first, moved.query_slot)} == {"meta"}


def test_what_the_models_own_implementation_would_have_got(implementation):
    given = arguments(implementation, None, queries=9)
    register()
    made = mask(**{**given, "allow_is_causal_skip": True})
    stock = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**{**given, "allow_is_causal_skip": True})
    assert (made.own() is None) == (stock is None) == (implementation == "sdpa")
    # `None` of a cut call would be a causal mask of other queries.
    assert torch.equal(made[:, :, -3:].own(), ALL_MASK_ATTENTION_FUNCTIONS[implementation](**given)[:, :, -3:])


def test_flash_attention_has_a_mask_only_of_padding():
    for padding in (None, PADDING["left"]):
        made, stock = both("flash_attention_2", padding)
        cut = made[:, :, -2:, :8]
        assert isinstance(cut, CausalMask)
        assert (cut.own() is None) == (stock is None) == (padding is None)
        if padding is None:
            with pytest.raises(UnsupportedCallError, match="set_attn_implementation"):
                cut.written_out()
        else:
            assert torch.equal(cut.own(), stock[:, :8])


@pytest.mark.parametrize("padded", [False, True])
def test_fewer_keys_than_queries_are_refused(padded):
    made, _ = both("sdpa", PADDING["left"] if padded else None)
    with pytest.raises(ShapeError, match=r"made for 9 keys and the layer has 3"):
        made.regions(1, 2, torch.zeros(2, 6, 4, 4), torch.zeros(2, 2, 3, 4))


def test_a_mask_that_is_not_plainly_causal_is_the_stock_mask(implementation, padding):
    made, stock = both(implementation, padding, function=sliding_window_causal_mask_function(3))
    assert type(made) is torch.Tensor
    assert torch.equal(made, stock)


def test_a_static_caches_counter_goes_on_without_the_mask():
    counter = torch.tensor(5)
    made, stock = both("sdpa", PADDING["left"], offset=counter)
    counter.add_(1)
    assert torch.equal(made.written_out(), stock)
    assert int(made.regions(1, 2, torch.zeros(2, 6, 4, 4), torch.zeros(2, 2, 9, 4)).query_slot) == 5


@pytest.mark.parametrize("sizes", [(2, 3, 9), (1, 4, 9), (2, 4, 8)])
def test_a_call_of_other_sizes_is_refused(sizes):
    made, _ = both("sdpa", PADDING["left"])
    batch, queries, keys = sizes
    with pytest.raises(ShapeError, match=r"\(2, 1, 4, 9\)|9 keys"):
        made.regions(1, 2, torch.zeros(batch, 6, queries, 4), torch.zeros(batch, 2, keys, 4))


@pytest.mark.parametrize("padded", [False, True])
def test_sizes_told_by_a_layer_without_keys_are_those_of_the_layer_at_hand(padded):
    padding = PADDING["left"] if padded else None
    register()
    made = mask(**(arguments("sdpa", padding, queries=1, keys=9) | {"kv_length": 1, "q_offset": 0}))
    regions = made.regions(1, 2, torch.zeros(2, 6, 1, 4), torch.zeros(2, 2, 9, 4))
    want = Regions.of(PADDING["left"] if padded else torch.ones(2, 9), query_length=1, sink_size=1, window_size=2)
    assert torch.equal(regions.valid, want.valid)
    assert regions.host == want.host


def test_it_survives_the_end_of_the_patch(implementation):
    given = arguments(implementation, PADDING["left"])
    register()
    made, config = mask(**given), given["config"]
    config._attn_implementation_internal = implementation
    assert torch.equal(made.written_out(), ALL_MASK_ATTENTION_FUNCTIONS[implementation](**given))
