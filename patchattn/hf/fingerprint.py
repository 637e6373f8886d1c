"""The fingerprint of a model: what must agree with the one that a calibration measured."""

from __future__ import annotations

import json
from typing import Any

from patchattn.calibration.manifest import Fingerprint
from patchattn.errors import CalibrationError
from patchattn.hf.architecture import head_dim, kv_heads, text_config


def fingerprint_of(model: Any) -> Fingerprint:
    """Take the fingerprint of a Hugging Face causal language model.

    Raises:
        CalibrationError: Its layers differ in their number of heads.
    """
    config = text_config(model)
    heads = config.num_attention_heads
    if not isinstance(heads, int):
        raise CalibrationError(
            f"The layers of {type(model).__name__} differ in their number of heads: a calibration can't hold that.",
            fix="use a threshold that is a number",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    # That of the first weights in floating point; that of the configuration where all are quantised.
    dtype = next((weights.dtype for weights in model.parameters() if weights.is_floating_point()), model.config.dtype)
    return Fingerprint(
        layers=config.num_hidden_layers,
        query_heads=heads,
        kv_heads=kv_heads(config),
        head_dim=head_dim(config),
        rope=json.dumps(rope, sort_keys=True, default=str),
        dtype=str(dtype).removeprefix("torch."),
    )
