"""What the model matrix shares: one model with its inputs, runs with recorded and replayed gates, the list of features.

`FEATURES` names every column of the matrix. Each test of `test_models.py` takes its cases from it, so that the page
docs/reference/models.md can't list what no test runs.
"""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager
from unittest import mock

import torch

import patchattn
from patchattn import MomentGate, OpenGate, Policy
from patchattn.hf.support import is_local
from patchattn.testing import FAMILIES, recorded_gates, replay_gates, tiny_model
from patchattn.testing.models import IMAGE_TOKEN, VISION_END, VISION_FAMILIES, VISION_START

MATRIX = (*FAMILIES, *VISION_FAMILIES)

# Long enough for prompt moments: 4 of sink, 16 of window and one chunk of 128, from the padded row too.
LENGTHS = (200, 176)
NEW_TOKENS = 4
MIXED = MomentGate(threshold=0.1)
ESTIMATED = 4 + 16 + 128

GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam search": {"num_beams": 2},
    "assisted": {"assistant_model": "tiny"},
    "prompt look-up": {"prompt_lookup_num_tokens": 3},
}
CACHES = {
    "static": {"cache_implementation": "static"},
    "fp8": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "quanto": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "q_group_size": 16}},
    "hqq": {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "axis_key": 1, "axis_value": 1}},
}
ON_CUDA_ONLY = ("offloaded", "offloaded_static")
"""Caches that transformers itself can't make without a CUDA device."""
COMPILED_ON_CUDA = ("llama", "gpt_oss", "deepseek_v3")
"""Families that run through `flex` there: groups, sink logits, values of another size. The rest share its kernels."""

TENSOR_PARALLEL = ("qwen3", "olmo2", "gpt_oss", "deepseek_v3", "gpt_neox")
"""Families that two processes share: with heads cut in slices, and with plans that gather them again."""

PACKED = (120, 80)
IGNORES_PACKING = ("gpt_oss",)
"""Families that transformers gives no packed mask: their stock model lets packed sequences see each other."""

IMAGE_TOKENS = {"gemma3": 4, "llava": 16, "qwen2_vl": 4}
BIDIRECTIONAL_IMAGES = ("gemma3",)
"""Families whose image tokens see each other both ways: a prompt with an image attends densely."""


class Case:
    """One tiny model, its inputs and how the stock model answers them."""

    backend = "auto"

    def __init__(self, family: str) -> None:
        self.family, self.model = family, tiny_model(family)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 120, (len(LENGTHS), max(LENGTHS)), generator=generator)
        self.mask = torch.zeros_like(self.ids)
        for row, length in enumerate(LENGTHS):
            self.mask[row, -length:] = 1
        self.ids *= self.mask
        self.real = self.mask.bool()
        modules = patchattn.hf.support.attention_modules(self.model)
        self.local = {index: module for index, module in modules.items() if is_local(module)}
        self.full = {index: module for index, module in modules.items() if not is_local(module)}

    @functools.cached_property
    def assistant(self):
        # A text model can't draft for one with positions in several dimensions.
        return tiny_model(self.family if self.family in VISION_FAMILIES else "llama", seed=1)

    def forward(self, model=None, ids=None, **kwargs):
        """Return logits of the batch, or of other inputs."""
        model = self.model if model is None else model
        if ids is None and "inputs_embeds" not in kwargs:
            ids = self.ids
            kwargs = {"attention_mask": self.mask, **kwargs}
        with torch.no_grad(), softmax_in_float64():
            return model(ids, **kwargs).logits

    def generate(self, **kwargs):
        """Return the new tokens; with an assistant or a look-up, of the first row only."""
        one = "assistant_model" in kwargs or "prompt_lookup_num_tokens" in kwargs
        rows = slice(0, 1) if one else slice(None)
        if "assistant_model" in kwargs:
            kwargs["assistant_model"] = self.assistant
        # A copy: transformers 5.17 takes the backend out of a cache_config, so that the next call has another.
        kwargs = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **copy.deepcopy(kwargs)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokens = self.model.generate(self.ids[rows], attention_mask=self.mask[rows], **kwargs)
        return tokens[:, self.ids.shape[1] :]

    def open(self, call):
        """Run with every gate open and check that all of it went through the gates."""
        with patchattn.patch(self.model, policy(OpenGate()), backend=self.backend) as handle:
            got = call()
        report = handle.report()
        assert report.open_fraction() == 1.0
        self.assert_only_local_layers_are_dense(report)
        return got, report

    def mixed(self, call, *, model=None):
        """Run with gates of both kinds; return what the call returns, the decisions and the report."""
        model = self.model if model is None else model
        with patchattn.patch(model, policy(MIXED), backend=self.backend, record="timeline") as handle:
            got = call()
        report = handle.report()
        gates = recorded_gates(handle)
        # Queries before the first full chunk always open: count those that have an estimate.
        estimated = torch.cat([gates[layer][0][0, :, ESTIMATED:].flatten() for layer in self.full])
        assert 0 < estimated.float().mean() < 1
        self.assert_only_local_layers_are_dense(report)
        return got, gates, report

    def replayed(self, call, gates, *, model=None):
        """Run the reference backend with recorded decisions, and check that all of them were used."""
        model = self.model if model is None else model
        with patchattn.patch(model, policy(MIXED), backend="reference") as handle:
            replay_gates(handle, gates)
            got = call()
            assert not any(state.replay for state in handle.states.values())
        self.assert_only_local_layers_are_dense(handle.report())
        return got

    def assert_only_local_layers_are_dense(self, report):
        calls = {sum(counts.gated_calls for counts in by_phase.values()) for by_phase in report.layers.values()}
        assert set(report.layers) == set(self.full)
        assert len(calls) == 1
        assert min(calls) > 0
        assert report.dense_calls == {
            index: {"local": min(calls)} if index in self.local else {} for index in (*self.full, *self.local)
        }

    def dense_by_mask(self, call):
        """Run with closed gates a call whose mask is not plainly causal, and check that no gate was asked."""
        with patchattn.patch(self.model, policy(patchattn.ClosedGate())) as handle:
            got = call()
        report = handle.report()
        dense = {index: {"local": 1} for index in self.local} | {index: {"mask": 1} for index in self.full}
        assert report.dense_calls == dense
        assert not any(counts.gated_calls for by_phase in report.layers.values() for counts in by_phase.values())
        return got


def with_image(family, image_seed=0):
    """Return a prompt of 200 tokens with one image of random pixels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 120, (1, 200), generator=generator)
    begin, count = 20, IMAGE_TOKENS[family]
    ids[0, begin : begin + count] = IMAGE_TOKEN
    is_image = (ids == IMAGE_TOKEN).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator.manual_seed(image_seed)
    if family == "qwen2_vl":
        ids[0, begin - 1], ids[0, begin + count] = VISION_START, VISION_END
        patches = {
            "pixel_values": torch.randn(16, 96, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
        return inputs | patches | {"mm_token_type_ids": is_image}
    inputs["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
    return inputs | ({"token_type_ids": is_image} if family in BIDIRECTIONAL_IMAGES else {})


def policy(gate):
    return Policy(sink_size=4, window_size=16, min_bulk=0, gate=gate)


def in_float64(model):
    return copy.deepcopy(model).double()


@contextmanager
def softmax_in_float64():
    """Let eager attention and routers keep float64: they ask for a float32 softmax whatever the model's dtype."""
    softmax = torch.nn.functional.softmax

    def keeping(scores, dim=None, dtype=None, **kwargs):
        return softmax(scores, dim=dim, dtype=scores.dtype if scores.dtype == torch.float64 else dtype, **kwargs)

    with mock.patch.object(torch.nn.functional, "softmax", keeping):
        yield
