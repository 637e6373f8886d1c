"""Policies survive being written and read."""

from __future__ import annotations

import json
import pickle

from hypothesis import given

from patchattn import Policy
from patchattn.testing.strategies import policies


@given(policies(calibrated=True))
def test_json_round_trip(policy: Policy) -> None:
    assert Policy.model_validate_json(policy.model_dump_json()) == policy
    assert Policy.model_validate_json(json.dumps(policy.model_dump(mode="json"))) == policy
    assert Policy.model_validate(policy.model_dump()) == policy
    assert hash(policy) == hash(Policy.model_validate(policy.model_dump()))
    assert pickle.loads(pickle.dumps(policy)) == policy
