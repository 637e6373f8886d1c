"""Which of transformers' common model tests are run on patched models, what they are refused, and what is left out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from patchattn import PatchAttnError, UnsupportedCallError

FAMILIES = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "deepseek_v3",
    "mixtral",
    "phi3",
    "gpt_neox",
    "smollm3",
    "olmo2",
    "cohere2",
)

SELECTED = (
    "test_all_tensors_are_parameter_or_buffer",
    "test_attention_outputs",
    "test_batching_equivalence",
    "test_bc_cache_name_forward",
    "test_can_capture_specific_layers_hidden_states",
    "test_capture_outputs_decorator",
    "test_causal_lm_loss_honors_shift_labels",
    "test_determinism",
    "test_eager_matches_batched_and_grouped_inference",
    "test_eager_matches_sdpa_inference",
    "test_enable_input_require_grads_with_gradient_checkpointing",
    "test_feed_forward_chunking",
    "test_hidden_states_output",
    "test_inputs_embeds",
    "test_inputs_embeds_matches_input_ids",
    "test_model_forward_default_config_values",
    "test_model_outputs_equivalence",
    "test_model_rope_scaling_from_config",
    "test_model_rope_with_partial_rotation",
    "test_output_router_logits_from_config",
    "test_problem_types",
    "test_retain_grad_hidden_states_attentions",
    "test_save_load",
    "test_sliding_window_mask",
    "test_training",
    "test_training_gradient_checkpointing",
)
"""Tests that run models forward, whatever else they do."""

WITHOUT_WEIGHTS = ("test_model_outputs_equivalence",)
"""Tests that are run once more as if the model could not return attention weights, for what they compare besides."""

ONLY_CASES = {"test_eager_matches_sdpa_inference": re.compile(r"(fp32|bf16)_pad_(left|right)(_no_attn_mask)?$")}
"""Cases of a parametrised test that are run where not all are: the others name kernels and a dtype for devices."""

ONE_OF_TWO = ("test_eager_matches_sdpa_inference",)
"""Tests that compare a model with itself under another attention implementation: the other one is left stock."""


@dataclass(frozen=True)
class Refusal:
    """Why a test can't pass on a patched model.

    Args:
        reason: The reason, in words.
        error: The type of the error that it must end with.
        says: What the error's text must say.
    """

    reason: str
    error: type[PatchAttnError]
    says: str


_WEIGHTS = Refusal("asks for attention weights, which are never formed", UnsupportedCallError, "output_attentions=True")
_BACKWARD = Refusal("trains, and the backend has no backward pass", UnsupportedCallError, "no backward pass")

REFUSED = {
    "test_attention_outputs": _WEIGHTS,
    "test_capture_outputs_decorator": _WEIGHTS,
    "test_model_outputs_equivalence": _WEIGHTS,
    "test_sliding_window_mask": _WEIGHTS,
    "test_enable_input_require_grads_with_gradient_checkpointing": _BACKWARD,
    "test_problem_types": _BACKWARD,
    "test_training": _BACKWARD,
    "test_training_gradient_checkpointing": _BACKWARD,
}
"""Tests that patched models refuse: one that passes, or ends with another error, is a mistake of the table or a bug."""

LEFT_ALONE = {
    "test_eager_matches_sdpa_inference": (("mixtral", "phi3"), "all its layers are sliding"),
    "test_retain_grad_hidden_states_attentions": (FAMILIES, "output_attentions"),
}
"""Tests that set up models which `check_support` refuses, for some families, with a part of its reason.

The first sets a sliding window wherever a configuration has one, the second configures models to return weights.
"""

LEFT_OUT = {
    "runs no model": (
        r"base_model_prefix|bc_torch_dtype|can_be_initialized|can_init|can_use_safetensors|cannot_load|"
        r"config_attn_implementation_setter|correct_missing_keys|enable_input_require_grads$|format_of_can_record|"
        r"from_pretrained_no_checkpoint|generation_tester_mixin|gradient_checkpointing_(backward|enable)|"
        r"internal_model_config|init_weights|keep_in_fp32|load_contiguous|model_base_model_prefix|"
        r"model_get_set_embeddings|model_is_small|model_main_input_name|model_rope_scaling_frequencies|"
        r"moe_models_record|num_layers_is_small|peft_gradient|reverse_loading|save_load_keys|tied_|tp_plan|"
        r"torch_save_load|load_save_without_tied|weights_reload|already_mapped_keys|non_composite|set_attention"
    ),
    "runs models after it has resized or loaded them, and compares what is not attention": (
        r"mismatched|resize_|load_with_(device|global)"
    ),
    "is for models with several towers or an encoder": (
        r"get_(audio|image|text|video)_features|composite|multimodal|vision_|encoder_decoder"
    ),
    "needs devices or packages that the machine does not have": (
        r"flash_attn|on_flash|flex_attention|deepspeed|offload|model_parallelism|kernels|compile|multi_gpu"
    ),
    "is another name for a way of checkpointing that is run": r"use_reentrant",
}
"""Why other tests are not run, with a pattern for their names."""
