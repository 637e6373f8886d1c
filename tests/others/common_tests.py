"""Makes test classes of transformers' common model tests: one for each family, with our configuration and inputs."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
import types
import unittest
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from fetch import common_tests

from patchattn.testing import tiny_model

PACKAGE = "tests_of_transformers"
MISSING = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
"""What the common tests import from files that the source distribution leaves out, as module and class."""

HEADS = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
BATCH, LENGTH = 3, 14
_NUMBERED = re.compile(r"(.+?)_\d+(?:_|$)")


def load() -> types.ModuleType:
    """Import the fetched tests, with empty classes in place of the missing ones."""
    name = f"{PACKAGE}.test_modeling_common"
    if name not in sys.modules:
        path = common_tests()
        for package in {PACKAGE, *(f"{PACKAGE}.{module.partition('.')[0]}" for module in MISSING)}:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = []
        for module, kind in MISSING.items():
            stand_in = types.ModuleType(f"{PACKAGE}.{module}")
            setattr(stand_in, kind, type(kind, (), {}))
            sys.modules[stand_in.__name__] = stand_in
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        # Their marks are not registered here, and pytest is asked to be strict about that.
        try:
            with mock.patch.object(pytest, "mark", pytest.MarkGenerator(_ispytest=True)):
                spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def cases() -> dict[str, list[str]]:
    """Return the names of all tests, each with those of its methods: `parameterized` makes one for each case."""
    found: dict[str, list[str]] = {}
    mixin = load().ModelTesterMixin
    for method in dir(mixin):
        if method.startswith("test_") and callable(getattr(mixin, method)):
            head = _NUMBERED.match(method)
            # It leaves None under the name it was given; numbers are a part of other names too.
            is_case = head is not None and getattr(mixin, head[1], method) is None
            found.setdefault(head[1] if is_case else method, []).append(method)
    return found


class Tester:
    """What the common tests ask about a model: its configuration, its inputs, and their sizes."""

    is_training = True

    def __init__(self, family: str) -> None:
        # The longest input is one and a half times as long as a model allows.
        self.config = tiny_model(family, initializer_range=0.02, max_position_embeddings=256).config
        if self.config._attn_implementation == "sdpa":
            # As in a configuration that no model was made from: the tests choose for themselves.
            self.config._attn_implementation_internal = None
        if "sliding_window" not in type(self.config)().to_dict():
            # Some tests set the field wherever there is one, and it would turn full layers into sliding ones.
            del self.config.sliding_window
        self.batch_size, self.seq_length = BATCH, LENGTH
        self.hidden_size, self.vocab_size = self.config.hidden_size, self.config.vocab_size
        self.num_hidden_layers = self.config.num_hidden_layers
        self.num_attention_heads = self.config.num_attention_heads

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, self.vocab_size, (BATCH, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        # On the right, where every row has a key to look at: losses count padding too, for labels are made for all.
        mask[1, -3:] = 0
        return copy.deepcopy(self.config), {"input_ids": ids, "attention_mask": mask}


def make_test_class(family: str) -> type[unittest.TestCase]:
    """Make the test class of one family."""
    mixin = load().ModelTesterMixin
    kind = type(Tester(family).config)
    found = [getattr(transformers, head)._model_mapping.get(kind, None) for head in HEADS]
    classes = tuple(model for model in found if model is not None)
    return type(
        f"{family}ModelTest",
        (mixin, unittest.TestCase),
        {
            "all_model_classes": classes,
            # Every expert is active in the tiny mixtures, but a router that ranks nothing has no gradient.
            "test_all_params_have_gradient": False,
            "own_implementation": tiny_model(family).config._attn_implementation,
            "setUp": lambda self: setattr(self, "model_tester", Tester(family)),
        },
    )
