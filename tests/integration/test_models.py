"""The model matrix: every supported family, through its real class, with every way of calling it.

With open gates a patched model is the stock model; with gates of both kinds it is the reference with the same
decisions. Every test also asserts that the gates ran. `python tests/integration/models_page.py` writes the table of
docs/reference/models.md from the same lists.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, cache_utils

import patchattn
from patchattn import OpenGate
from patchattn.hf.architecture import cache_layer, with_cache
from patchattn.testing import assert_within_budget
from patchattn.testing.models import VISION_FAMILIES

sys.path.insert(0, str(Path(__file__).parent))

from matrix import (
    BIDIRECTIONAL_IMAGES,
    CACHES,
    COMPILED_ON_CUDA,
    GENERATION,
    IGNORES_PACKING,
    MATRIX,
    NEW_TOKENS,
    ON_CUDA_ONLY,
    PACKED,
    Case,
    in_float64,
    policy,
    with_image,
)
from models_page import BEGIN, END, PAGE, written_part


@pytest.fixture(scope="module", params=MATRIX)
def case(request):
    return Case(request.param)


def quantises(name):
    return {"quanto": "optimum.quanto", "hqq": "hqq"}.get(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward(case, dtype):
    model = case.model if dtype == torch.float32 else copy.deepcopy(case.model).to(dtype)
    case = copy.copy(case)
    case.model, real = model, case.real
    exact = in_float64(model)
    plain, truth = case.forward()[real], case.forward(exact)[real]
    got, _ = case.open(case.forward)
    assert_within_budget(got[real], plain, truth, "open gates")

    got, gates, _ = case.mixed(case.forward)
    plain = case.replayed(case.forward, gates)[real]
    truth = case.replayed(lambda: case.forward(exact), gates, model=exact)[real]
    assert_within_budget(got[real], plain, truth, "mixed gates")


def test_calls_without_cache_and_with_embeddings(case):
    got, gates, _ = case.mixed(case.forward)
    embeddings = case.model.get_input_embeddings()(case.ids)
    for kwargs in (
        {"use_cache": False},
        {"inputs_embeds": embeddings, "attention_mask": case.mask},
    ):
        again, same, _ = case.mixed(lambda kwargs=kwargs: case.forward(**kwargs))
        assert torch.equal(again, got)
        for layer, calls in gates.items():
            assert all(torch.equal(*pair) for pair in zip(calls, same[layer], strict=True))


def test_moments_are_kept_with_the_cache_of_the_gated_layers(case):
    cache = DynamicCache(config=case.model.config)
    case.mixed(lambda: case.forward(**with_cache(case.model, cache)))
    keeps = {index for index, entry in enumerate(cache.layers) if getattr(entry, "tracks_moments", False)}
    modules = case.full | case.local
    assert keeps == {cache_layer(module, modules) for module in case.full.values()}


# Sampling calls a model as greedy decoding does, and test_generation_cases.py samples too.
@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow) if mode == "sampling" else mode for mode in GENERATION]
)
def test_generate(case, mode):
    check_generation(case, GENERATION[mode])


@pytest.mark.parametrize("cache", CACHES)
def test_caches(case, cache):
    if cache == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this version of transformers has no fp8 cache")
    if quantises(cache):
        pytest.importorskip(quantises(cache))
    if case.local and CACHES[cache]["cache_implementation"] == "quantized":
        with pytest.raises(ValueError, match="only full attention layers"):
            case.generate(**CACHES[cache])
        return
    check_generation(case, CACHES[cache])


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ON_CUDA_ONLY)
def test_offloaded_caches(case, cache):
    # What a cache does to its tensors is the same with each backend, and this one compiles nothing.
    check_generation(on_cuda(case, "blockwise"), {"cache_implementation": cache})


@pytest.mark.gpu
@pytest.mark.parametrize("case", COMPILED_ON_CUDA, indirect=True)
def test_compiled_attention(case):
    check_generation(on_cuda(case, "flex"), {"cache_implementation": "static"})


def on_cuda(case, backend):
    moved = copy.copy(case)
    moved.model, moved.backend = copy.deepcopy(case.model).cuda(), backend
    moved.ids, moved.mask = case.ids.cuda(), case.mask.cuda()
    return moved


def check_generation(case, kwargs):
    stock = case.generate(**kwargs)
    got, report = case.open(lambda: case.generate(**kwargs))
    assert torch.equal(got, stock)
    # One row at a time, a look-up that finds nothing decodes; otherwise several drafted tokens are checked at once.
    # The last layers of Gemma 4 get the last query of a prompt only.
    assert report.layers[min(report.layers)]["prefill"].gated_calls >= 1

    got, gates, report = case.mixed(lambda: case.generate(**kwargs))
    assert torch.equal(case.replayed(lambda: case.generate(**kwargs), gates), got)
    if not {"assistant_model", "prompt_lookup_num_tokens"} & set(kwargs):
        assert 0 < report.open_fraction("decode") < 1


def test_packed_sequences(case):
    ids = case.ids[:1]
    position_ids = torch.cat([torch.arange(length) for length in PACKED])[None]
    if case.family == "qwen2_vl":  # text positions, then time, height and width
        position_ids = position_ids.expand(4, 1, -1)

    def packed():
        return case.forward(ids=ids, position_ids=position_ids, use_cache=False)

    stock = packed()
    alone = case.forward(ids=ids[:, PACKED[0] :], use_cache=False)
    apart = torch.allclose(stock[:, PACKED[0] :], alone, atol=1e-3)
    if case.family in IGNORES_PACKING:
        assert not apart
        assert torch.allclose(case.open(packed)[0], stock, atol=1e-4)
    else:
        assert apart
        assert torch.equal(case.dense_by_mask(packed), stock)


def test_masks_of_the_caller(case):
    causal = case.mask.bool()[:, None, None] & torch.ones(200, 200).tril().bool()
    causal = causal | torch.eye(200).bool()
    if case.model.config.get_text_config()._attn_implementation == "eager":
        causal = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)

    def masked():
        return case.forward(ids=case.ids, attention_mask=causal)

    stock = masked()
    assert torch.equal(case.dense_by_mask(masked), stock)


def test_sliding_layers_keep_their_implementation_and_mask(case):
    if not case.local:
        assert case.full
        return
    seen = {}

    def keep(module, args, kwargs, output):
        mask = kwargs.get("attention_mask")
        seen.setdefault(module.layer_idx, []).append((kwargs["hidden_states"], mask, output[0]))

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in case.local.values()]
    try:
        case.forward()
        case.mixed(case.forward)
    finally:
        for hook in hooks:
            hook.remove()
    assert 0 in seen
    for index, ((hidden, mask, output), (patched_hidden, patched_mask, patched_output)) in seen.items():
        assert torch.equal(mask, patched_mask)
        assert mask.dtype == patched_mask.dtype
        if index == 0:
            assert torch.equal(hidden, patched_hidden)
            assert torch.equal(output, patched_output)


@pytest.mark.parametrize("case", VISION_FAMILIES, indirect=True)
def test_images(case):
    inputs = with_image(case.family)
    other = with_image(case.family, image_seed=1)

    def generate():
        return case.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[:, 200:]

    def forward():
        with torch.no_grad():
            return case.model(**inputs).logits

    stock, logits = generate(), forward()
    with torch.no_grad():
        assert not torch.allclose(case.model(**other).logits, logits, atol=1e-2)
    if case.family not in BIDIRECTIONAL_IMAGES:
        got, _ = case.open(generate)
        assert torch.equal(got, stock)
        got, gates, _ = case.mixed(generate)
        assert torch.equal(case.replayed(generate, gates), got)
        return
    assert torch.equal(case.dense_by_mask(forward), logits)
    with patchattn.patch(case.model, policy(OpenGate())) as handle:
        assert torch.equal(generate(), stock)
    report = handle.report()
    assert all(report.dense_calls[layer] == {"mask": 1} for layer in case.full)
    assert all(report.layers[layer]["decode"].gated_calls == NEW_TOKENS - 1 for layer in case.full)
    assert report.open_fraction() == 1.0


def test_the_page_says_what_the_matrix_does():
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == written_part(), (
        "run python tests/integration/models_page.py"
    )
