"""Tests of `patchattn.policy`."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from patchattn.gates import MomentGate, OracleGate, StaticGate
from patchattn.policy import Policy


def test_json_names_gate_and_version() -> None:
    written = json.loads(Policy(gate=StaticGate(open_heads=((1, 2),))).model_dump_json())
    assert written["schema_version"] == 1
    assert written["gate"] == {"kind": "static", "open_heads": [[1, 2]]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sink_size", -1),
        ("sink_size", 1.5),
        ("window_size", 0),
        ("window_size", -5),
        ("window_size", "wide"),
        ("layers", (-1,)),
        ("layers", 3),
        ("layers", ()),
        ("phases", frozenset()),
        ("phases", frozenset({"training"})),
        ("window_size", 2**31),
        ("sink_size", 2**31),
        ("min_bulk", -1),
        ("min_bulk", "automatic"),
        ("schema_version", 2),
        ("gate", None),
        ("gate", "moment"),
        ("gate", {"kind": "clairvoyant"}),
        ("gate", {"threshold": 0.5}),
        ("gate", {"kind": "open", "threshold": 0.5}),
        ("gate", {"kind": "moment", "moments": "guess"}),
        ("gate", {"kind": "moment", "estimate": "gaussian"}),
        ("gate", {"kind": "static", "open_heads": [[0]]}),
        ("gate", {"kind": "static", "open_heads": [[0, -1]]}),
        ("windw_size", 128),
    ],
)
def test_bad_field_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Policy(**{field: value})
    assert field in str(caught.value)


@pytest.mark.parametrize("kind", [MomentGate, OracleGate])
@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 1.1, math.nan, math.inf, -math.inf, None, "high"])
def test_threshold_outside_the_open_interval_is_refused(kind: type, threshold: Any) -> None:
    with pytest.raises(ValidationError, match="threshold"):
        kind(threshold=threshold)


@pytest.mark.parametrize("made", [Policy(), MomentGate(), StaticGate()])
def test_frozen(made: Any) -> None:
    field = next(iter(type(made).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, field, None)


def test_order_and_repetition_do_not_matter() -> None:
    assert Policy(layers=(3, 1, 3)) == Policy(layers=(1, 3))
    assert StaticGate(open_heads=((1, 0), (0, 2), (1, 0))) == StaticGate(open_heads=((0, 2), (1, 0)))


def test_json_has_the_phases_in_one_order_whatever_the_order_of_the_set() -> None:
    for phases in (("decode", "prefill"), ("prefill", "decode")):
        made = Policy.model_construct(phases=phases)  # a tuple, because the order of a set changes from run to run
        assert json.loads(made.model_dump_json())["phases"] == ["prefill", "decode"]
        assert made.model_dump(mode="json")["phases"] == ["prefill", "decode"]
    assert Policy().model_dump()["phases"] == frozenset({"prefill", "decode"})
