"""What a model promises about generation holds for a patched one too: 12 families, next to their stock twins.

With open gates the patched model gives the stock model's tokens, scores and logits, and what must not matter to a
stock model (a cache, padding, embeddings in place of tokens, drafts of another model) does not matter to it either.
Every comparison also asserts that all full layers went through their gates.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

import patchattn
from patchattn import OpenGate, Policy
from patchattn.hf.architecture import with_cache
from patchattn.testing import tiny_model

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
LENGTHS = (40, 28)
NEW_TOKENS = 5
POLICY = Policy(sink_size=4, window_size=8, min_bulk=0, gate=OpenGate())
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class StopAfter(StoppingCriteria):
    """Stops each row after its own number of tokens."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= max(LENGTHS) + self.lengths


class Twins:
    """A stock model and its patched copy, with a left-padded batch."""

    def __init__(self, family):
        self.stock = tiny_model(family)
        self.patched = copy.deepcopy(self.stock)
        self.handle = patchattn.patch(self.patched, POLICY)
        (self.cache,) = with_cache(self.stock, None)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 120, (len(LENGTHS), max(LENGTHS)), generator=generator)
        self.mask = torch.zeros_like(self.ids)
        for row, length in enumerate(LENGTHS):
            self.mask[row, -length:] = 1
        self.ids *= self.mask
        self.one = {"input_ids": self.ids[:1]}

    def batch(self):
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def through_gates(self, call, dense=("local",)):
        """Call with the patched model; all of its full layers must go through their gates, which are open.

        `dense` names the reasons for which other calls may attend densely.
        """
        self.handle.reset_report()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            got = call(self.patched)
        report = self.handle.report()
        assert report.open_fraction() == 1.0
        for by_phase in report.layers.values():
            assert sum(counts.gated_calls for counts in by_phase.values()) > 0
        assert all(set(reasons) <= set(dense) for reasons in report.dense_calls.values())
        return got

    def both(self, call, dense=("local",)):
        """Return what the stock and the patched model answer, from the same random state."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            expected = call(self.stock)
        return expected, self.through_gates(call, dense)

    def forward(self, model, **kwargs):
        return model(**{**self.batch(), **kwargs}).logits

    def generate(self, model, inputs=None, **kwargs):
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
        options |= {"output_scores": True, "output_logits": True}
        return model.generate(**(self.batch() if inputs is None else inputs), **{**options, **kwargs})


@pytest.fixture(scope="module", params=FAMILIES)
def twins(request):
    return Twins(request.param)


def assert_same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.scores) == len(expected.scores) > 0
    for mine, theirs in zip(got.scores + got.logits, expected.scores + expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def new_tokens(output):
    return output.sequences[:, -len(output.scores) :]


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 0.7},
    "several samples of a prompt": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams that sample": {"num_beams": 2, "do_sample": True},
    "prefill in pieces": {"prefill_chunk_size": 16},
    "logits of the whole prompt": {"logits_to_keep": 0},
    "rows that stop apart": {"stopping_criteria": StoppingCriteriaList([StopAfter((2, 4))]), "pad_token_id": 0},
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_scores_and_logits(twins, way):
    expected, got = twins.both(lambda model: twins.generate(model, **WAYS[way]))
    assert_same(got, expected)
    if "num_beams" in WAYS[way]:
        torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, **CLOSE)


def test_end_of_sequence_ends_rows_and_a_least_length_holds_it_back(twins):
    plain = twins.through_gates(twins.generate)
    # What the first row says second: it ends there, and not before a least length that goes further.
    end = int(new_tokens(plain)[0, 1])
    for least in (0, 4):
        options = {"eos_token_id": end, "pad_token_id": 0, "min_new_tokens": least}
        expected, got = twins.both(lambda model, options=options: twins.generate(model, **options))
        assert_same(got, expected)
        assert (end in new_tokens(got)[0, :4]) is (least == 0)


@pytest.fixture(scope="module")
def tokenizer():
    # transformers measures words by what it finds behind this one.
    words = {f"w{token}.": token for token in range(128)} | {"abcdef": 128}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0.")))


def test_a_string_ends_rows(twins, tokenizer):
    third = int(new_tokens(twins.through_gates(twins.generate))[0, 2])
    options = {"stop_strings": [f"w{third}."], "tokenizer": tokenizer, "pad_token_id": 0}
    expected, got = twins.both(lambda model: twins.generate(model, twins.one, **options))
    assert_same(got, expected)
    assert third in new_tokens(got)[0, :3]
    assert len(got.scores) <= 3


def test_generation_does_not_need_a_cache(twins):
    cached = twins.through_gates(twins.generate)
    assert_same(twins.through_gates(lambda model: twins.generate(model, use_cache=False)), cached)


def test_a_static_cache_is_as_good_as_a_dynamic_one(twins):
    expected, got = twins.both(lambda model: twins.generate(model, cache_implementation="static"))
    assert_same(got, expected)
    assert_same(got, twins.through_gates(twins.generate))


def test_generation_goes_on_from_a_returned_cache(twins):
    def in_two(first, second):
        begun = twins.generate(first, max_new_tokens=2)
        mask = torch.cat([twins.mask, torch.ones_like(twins.mask[:, :2])], dim=1)
        inputs = {"input_ids": begun.sequences, "attention_mask": mask, twins.cache: begun[twins.cache]}
        return twins.generate(second, inputs, max_new_tokens=NEW_TOKENS - 2)

    whole = twins.through_gates(twins.generate)
    for begins in (twins.patched, twins.stock):
        got = twins.through_gates(lambda model, begins=begins: in_two(begins, model))
        assert torch.equal(got.sequences, whole.sequences)
        for mine, theirs in zip(got.logits, whole.logits[2:], strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)
    # And the other way round: the stock model goes on with a cache that a patched one filled.
    with torch.no_grad():
        assert torch.equal(in_two(twins.patched, twins.stock).sequences, whole.sequences)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_embeddings_in_place_of_tokens(twins, cache):
    with torch.no_grad():
        embeddings = twins.stock.get_input_embeddings()(twins.ids)
    inputs = {"inputs_embeds": embeddings, "attention_mask": twins.mask}
    expected, got = twins.both(lambda model: twins.generate(model, inputs, cache_implementation=cache))
    assert_same(got, expected)
    assert torch.equal(new_tokens(got), new_tokens(twins.through_gates(twins.generate)))


def test_a_prompt_of_one_token_grows_into_the_gates(twins):
    inputs = {"input_ids": twins.ids[:1, -1:]}
    expected, got = twins.both(lambda model: twins.generate(model, inputs, max_new_tokens=16), dense=("local", "short"))
    assert_same(got, expected)


def test_positions_may_be_given_or_left_to_the_mask(twins):
    positions = (twins.mask.cumsum(1) - 1).clamp(min=0)
    expected, got = twins.both(lambda model: twins.forward(model, position_ids=positions))
    real = twins.mask.bool()
    torch.testing.assert_close(got[real], expected[real], **CLOSE)
    given = twins.through_gates(lambda model: twins.generate(model, {**twins.batch(), "position_ids": positions}))
    assert_same(given, twins.through_gates(twins.generate))


def test_padding_on_the_left_changes_nothing(twins):
    length = LENGTHS[1]
    alone = {"input_ids": twins.ids[1:, -length:], "attention_mask": twins.mask[1:, -length:]}
    padded = twins.through_gates(twins.generate)
    got = twins.through_gates(lambda model: twins.generate(model, alone))
    assert torch.equal(new_tokens(got), new_tokens(padded)[1:])
    for mine, theirs in zip(got.logits, padded.logits, strict=True):
        torch.testing.assert_close(mine, theirs[1:], **CLOSE)


def test_padding_on_the_right_changes_nothing_at_real_tokens(twins):
    length = LENGTHS[1]
    mask = torch.ones_like(twins.mask)
    mask[1, length:] = 0
    ids = torch.where(mask.bool(), torch.roll(twins.ids, length, 1), 0)
    expected, got = twins.both(lambda model: twins.forward(model, input_ids=ids, attention_mask=mask))
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    alone = twins.through_gates(lambda model: model(ids[1:, :length]).logits)
    torch.testing.assert_close(got[1, :length], alone[0], **CLOSE)


@pytest.mark.parametrize("kept", [1, 4, torch.tensor([3, -1])], ids=str)
def test_logits_of_some_tokens_are_those_of_all(twins, kept):
    every = twins.through_gates(twins.forward)
    got = twins.through_gates(lambda model: twins.forward(model, logits_to_keep=kept))
    # Padding has no logits that mean anything: the first row is full.
    torch.testing.assert_close(got[0], every[0, -kept:] if isinstance(kept, int) else every[0, kept], **CLOSE)


def test_hidden_states_of_every_layer(twins):
    expected, got = twins.both(lambda model: model(**twins.one, output_hidden_states=True).hidden_states)
    assert len(got) == len(expected) == twins.stock.config.num_hidden_layers + 1
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_tokens_one_by_one_are_tokens_at_once(twins):
    every = twins.through_gates(lambda model: model(**twins.one).logits)

    def one_by_one(model):
        output = model(twins.ids[:1, :20])
        logits = [output.logits]
        for token in range(20, max(LENGTHS)):
            output = model(twins.ids[:1, token : token + 1], **{twins.cache: output[twins.cache]})
            logits.append(output.logits)
        return torch.cat(logits, dim=1)

    torch.testing.assert_close(twins.through_gates(one_by_one), every, **CLOSE)


@pytest.mark.parametrize("drafts", ["of a patched model", "of the prompt"])
def test_drafts_change_no_token(twins, drafts):
    options = {"prompt_lookup_num_tokens": 3}
    if drafts == "of a patched model":
        assistant = tiny_model("llama", seed=1)
        patchattn.patch(assistant, POLICY)
        options = {"assistant_model": assistant}
    expected, got = twins.both(lambda model: twins.generate(model, twins.one, **options))
    assert_same(got, expected)
    assert torch.equal(got.sequences, twins.through_gates(lambda model: twins.generate(model, twins.one)).sequences)
    # Of sampled drafts some are refused, and the cache is cut back.
    options |= {"do_sample": True, "top_k": 20}
    assert_same(*twins.both(lambda model: twins.generate(model, twins.one, **options)))
