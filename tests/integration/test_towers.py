"""Models with other towers: only the decoder is patched, and only the decoder decides whether it can be."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, VoxtralForConditionalGeneration

import patchattn
from patchattn import OpenGate, Policy
from patchattn.testing.models import _OWN_FIELDS, _TEXT

OPEN = Policy(sink_size=4, window_size=16, min_bulk=0, gate=OpenGate())
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    # A vision tower and an audio tower whose attention does not go through transformers' interface as the decoder's.
    "gemma4": {
        "text_config": {**_TEXT, **_OWN_FIELDS["gemma4_text"], "model_type": "gemma4_text"},
        "vision_config": {**TOWER, "num_key_value_heads": 2, "head_dim": 16, "model_type": "gemma4_vision"},
        "audio_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "output_proj_dims": 32,
            "model_type": "gemma4_audio",
        },
    },
    "glm_ocr": {
        "text_config": {
            **_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 96,
        },
    },
    "voxtral": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "audio_config": {**TOWER, "model_type": "voxtral_encoder"},
    },
}


def build(family):
    config = AutoConfig.for_model(family, **CONFIGS[family], attn_implementation="eager")
    kind = VoxtralForConditionalGeneration if family == "voxtral" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config) if kind is None else kind(config)
    return model.eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_decoder_is_patched_and_the_towers_stay_as_they_are(family):
    model = build(family)
    towers = {name: type(part.forward) for name, part in model.named_modules() if "tower" in name or "visual" in name}
    assert towers
    support = patchattn.check_support(model)
    assert support, str(support)
    ids = torch.randint(2, 120, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        logits, written = model(ids, attention_mask=mask).logits, model.generate(ids, **kwargs)
        with patchattn.patch(model, OPEN) as handle:
            patched = [name for name, part in model.named_modules() if name.endswith("patchattn_layer")]
            got = model(ids, attention_mask=mask).logits
            assert torch.equal(model.generate(ids, **kwargs), written)
    assert len(patched) == len(support.layers) + len(support.local_layers) == 3
    assert all("tower" not in name and "visual" not in name for name in patched)
    assert torch.allclose(got[mask.bool()], logits[mask.bool()], atol=1e-4)
    assert handle.report().open_fraction() == 1.0
