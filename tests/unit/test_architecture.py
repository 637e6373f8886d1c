"""Names of transformers are read in one place, and by what things are where the name may change."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import patchattn
from patchattn.hf import architecture
from patchattn.hf.support import attention_modules
from patchattn.testing import FAMILIES, tiny_model
from patchattn.testing.models import HYBRID_FAMILIES, VISION_FAMILIES

PACKAGE = Path(patchattn.__file__).parent


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past", "a_later_name"])
def test_a_cache_is_found_under_any_name(name):
    cache = DynamicCache()
    assert architecture.cache_among({"hidden_states": torch.zeros(1), name: cache, "use_cache": True}.values()) is cache
    assert architecture.cache_among({"hidden_states": torch.zeros(1), name: None}.values()) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_argument_is_the_one_that_the_model_takes(name):
    class Old:
        def forward(self, input_ids, past_key_values=None):
            """Take the cache as transformers before 5.24."""

    class New:
        def forward(self, input_ids, cache=None, **kwargs):
            """Take the cache as transformers from 5.24 on."""

    model = New() if name == "cache" else Old()
    given = DynamicCache()
    wrapped = SimpleNamespace(_orig_mod=model)
    adapted = SimpleNamespace(get_base_model=lambda: model)
    for one in (model, wrapped, adapted):
        assert architecture.with_cache(one, given) == {name: given}


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(tiny_model("llama").config, max_cache_len=20)])
def test_the_installed_version_takes_the_cache_and_gives_it_back(make):
    model, cache = tiny_model("llama"), make()
    with torch.no_grad():
        output = model(torch.ones(1, 8, dtype=torch.long), **architecture.with_cache(model, cache))
    assert architecture.cache_of(output) is cache
    assert cache.get_seq_length() == 8
    assert architecture.cache_of(BaseModelOutputWithPast(last_hidden_state=torch.zeros(1))) is None
    assert architecture.cache_of(SimpleNamespace(logits=torch.zeros(1))) is None


@pytest.mark.parametrize("family", [*FAMILIES, *VISION_FAMILIES, *HYBRID_FAMILIES])
def test_heads_are_those_that_attention_is_given(family):
    model, seen = tiny_model(family), {}
    modules = attention_modules(model)
    with patchattn.patch(model, patchattn.Policy(sink_size=1, window_size=4, min_bulk=0)) as handle:
        for index, state in handle.states.items():
            attend = state.attend

            def kept(inputs, *rest, index=index, attend=attend):
                seen[index] = inputs
                return attend(inputs, *rest)

            state.attend = kept
        with torch.no_grad():
            model(torch.ones(1, 20, dtype=torch.long))
    assert seen
    for index, inputs in seen.items():
        module = modules[index]
        assert inputs.query.shape[1] == architecture.query_heads(module)
        assert inputs.group_size == architecture.group_size(module)
        assert (inputs.key.shape[3], inputs.value.shape[3]) == architecture.head_sizes(module)
        assert inputs.softcap == architecture.softcap_of(module)
        assert (inputs.sink_logits is not None) == architecture.has_sink_logits(module)


def test_layers_that_share_keys_name_the_layer_that_has_them():
    types = ["sliding_attention", "full_attention"] * 3
    model = tiny_model("gemma4_text", num_hidden_layers=6, layer_types=types, num_kv_shared_layers=3)
    modules = attention_modules(model)
    assert [architecture.cache_layer(module, modules) for module in modules.values()] == [0, 1, 2, 1, 2, 1]
    assert model.model.layers[3].self_attn.is_kv_shared_layer


def test_effects_are_the_arguments_of_attention_functions():
    module = attention_modules(tiny_model("llama"))[0]
    effects = architecture.arguments_with_effect(module)
    assert {"cu_seq_lens_q", "is_causal", "sliding_window", "output_attentions"} <= effects
    assert not effects & {"labels", "tokenizer", "position_ids", "scaling", "query", "attention_mask", "use_cache"}


FOREIGN = (
    "past_key_values",
    "layer_past",
    "num_key_value_heads",
    "num_key_value_groups",
    "max_position_embeddings",
    "vocab_size",
    "attn_logit_softcapping",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_name_or_path",
    "_commit_hash",
)
ELSEWHERE = {
    "hf/support.py": {"max_position_embeddings"},  # in an explanation of a window that covers all positions
    "testing/models.py": set(FOREIGN),  # makes configurations
    "testing/strategies.py": {"vocab_size"},  # an argument of its own
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_reads_names_of_transformers(path):
    own = path.relative_to(PACKAGE).as_posix()
    if own == "hf/architecture.py":
        return
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    assert found & set(FOREIGN) <= ELSEWHERE.get(own, set())
