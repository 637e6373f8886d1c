"""A model that drafts writes what dense attention writes, whatever its heads do, and its cache stays the dense one."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CompileConfig, DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import StaticLayer

import patchattn
from patchattn import ClosedGate, MomentGate, OpenGate, OracleGate, Policy, PolicyError, UnsupportedCallError
from patchattn.hf.architecture import with_cache
from patchattn.hf.candidates import Candidates
from patchattn.hf.drafting import _slides_between_crops
from patchattn.moments.running import PromptMoments
from patchattn.testing import tiny_model

POLICY = Policy(sink_size=4, window_size=16, min_bulk=0, gate=MomentGate(threshold=0.3))
FAMILIES = ["llama", *(["gemma2", "gpt_oss", "gemma4_text"] if _slides_between_crops() else [])]
HAS_STATIC = pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="static caches can't be cropped before 5.24")


def text(length, seed=0):
    return torch.randint(2, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def write(model, ids, new=24, **options):
    return model.generate(ids, **{"max_new_tokens": new, "do_sample": False, **options})


def both(family, ids, policy=POLICY, tokens=3, prefill="dense", run=write, **options):
    """What a model writes without drafts, with them, and the report."""
    model = tiny_model(family)
    want = run(model, ids, **options)
    with patchattn.draft(model, policy, tokens=tokens, prefill=prefill) as handle:
        got = run(model, ids, **options)
    return want, got, handle.report()


@pytest.mark.parametrize("gate", [ClosedGate(), MomentGate(threshold=0.3), OracleGate(threshold=0.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_dense_attention(family, gate):
    want, got, report = both(family, text(200), POLICY.model_copy(update={"gate": gate}))
    assert torch.equal(want, got)
    drafts = report.drafts
    assert drafts.rounds > 0
    assert drafts.accepted < drafts.drafted or gate != ClosedGate()
    assert want.shape[1] - 200 - 1 == drafts.accepted + drafts.rounds + sum(drafts.without_draft.values())
    if gate == ClosedGate():
        assert report.open_fraction("decode") == 0
    assert report.dense_calls_by_reason()["not drafting"] > 0
    assert not report.counts("prefill") or all(c.gated_calls == 0 for c in report.counts("prefill").values())


@settings(max_examples=15)
@given(st.data())
def test_any_prompt_policy_and_length_of_draft(data):
    family = data.draw(st.sampled_from(FAMILIES))
    policy = Policy(
        sink_size=data.draw(st.integers(0, 8)),
        window_size=data.draw(st.integers(1, 40)),
        min_bulk=data.draw(st.sampled_from([0, 1, 130])),
        gate=data.draw(
            st.sampled_from([ClosedGate(), OpenGate(), MomentGate(threshold=0.3), OracleGate(threshold=0.5)])
        ),
    )
    ids = text(data.draw(st.integers(1, 300)), data.draw(st.integers(0, 99)))
    options = {"repetition_penalty": 1.3} if data.draw(st.booleans()) else {}
    want, got, _ = both(family, ids, policy, data.draw(st.sampled_from(["auto", *range(1, 9)])), **options)
    assert torch.equal(want, got)


def test_all_open_drafts_are_all_accepted():
    want, got, report = both("llama", text(120), POLICY.model_copy(update={"gate": OpenGate()}), new=21)
    assert torch.equal(want, got)
    assert report.drafts.acceptance == 1
    assert report.drafts.tokens_per_round == pytest.approx(4)


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("gate", [OpenGate(), ClosedGate()])
@pytest.mark.parametrize("how", ["criteria", "eos"])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_text_ends_where_dense_attention_ends_it(how, at, gate):
    """Also where the token at which it stops was drafted, which assisted generation by itself would run past."""
    ids = text(100, 3)
    token = write(tiny_model("llama"), ids)[0, 100 + at].item()
    options = {"eos_token_id": token}
    if how == "criteria":
        options = {"stopping_criteria": StoppingCriteriaList([StopAt(token)])}
    want, got, report = both("llama", ids, POLICY.model_copy(update={"gate": gate}), tokens=4, **options)
    assert torch.equal(want, got)
    assert set(report.drafts.without_draft) <= {"last token"}


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5])
def test_a_text_is_as_long_as_asked_for(new):
    want, got, report = both("llama", text(60), POLICY.model_copy(update={"gate": OpenGate()}), new=new)
    assert torch.equal(want, got)
    assert report.drafts.drafted <= max(0, new - 2)


def test_left_padding_of_one_text():
    ids, mask = text(100), torch.ones(1, 100, dtype=torch.long)
    mask[:, :9] = 0
    want, got, report = both("llama", ids, attention_mask=mask)
    assert torch.equal(want, got)
    assert 0 < report.drafts.accepted


@HAS_STATIC
def test_static_cache():
    want, got, report = both("llama", text(200), cache_implementation="static")
    assert torch.equal(want, got)
    assert 0 < report.drafts.accepted
    assert set(report.rebuilt_by_reason()) <= {"never kept"}


def talk(model, ids, **options):
    """Write two turns with one cache."""
    (name,) = with_cache(model, None)
    cache = DynamicCache(config=model.config)
    first = write(model, ids, **{name: cache}, **options)
    return write(model, torch.cat([first, text(40, 5)], 1), **{name: cache}, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_filled_cache_is_continued(family):
    want, got, report = both(family, text(80), run=talk)
    assert torch.equal(want, got)
    assert report.drafts.accepted > 0


def contents(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("gate", [ClosedGate(), MomentGate(threshold=0.3)])
def test_the_cache_afterwards_is_the_dense_one(gate):
    model, ids = tiny_model("llama").double(), text(150)
    (name,) = with_cache(model, None)
    caches = [DynamicCache(), DynamicCache()]
    write(model, ids, **{name: caches[0]})
    with patchattn.draft(model, POLICY.model_copy(update={"gate": gate}), tokens=4):
        write(model, ids, **{name: caches[1]})
    for want, got in zip(contents(caches[0]), contents(caches[1]), strict=True):
        for a, b in zip(want, got, strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_a_user_s_own_calls_are_dense():
    model, ids = tiny_model("llama").double(), text(150)
    want = model(ids).logits
    with patchattn.draft(model, POLICY.model_copy(update={"gate": ClosedGate()})) as handle:
        got = model(ids).logits
    assert torch.allclose(want, got, rtol=0, atol=1e-10)
    assert handle.report().dense_calls_by_reason() == {"not drafting": 3}


def test_gated_prefill_writes_what_a_gated_prefill_and_dense_steps_write():
    model, ids = tiny_model("llama").double(), text(200)
    closed = POLICY.model_copy(update={"gate": ClosedGate()})
    with patchattn.patch(model, closed.model_copy(update={"phases": frozenset({"prefill"})})):
        want = write(model, ids)
    assert not torch.equal(want, write(model, ids))
    with patchattn.draft(model, closed, tokens=3, prefill="gated") as handle:
        assert torch.equal(write(model, ids), want)
    assert all(c.gated_calls == 1 for c in handle.report().counts("prefill").values())


def test_a_generation_that_fails_leaves_no_gate_on():
    def fail(*_):
        raise KeyError("stop")

    model, ids = tiny_model("llama").double(), text(100)
    want = model(ids).logits
    for prefill in ("dense", "gated"):
        with patchattn.draft(model, POLICY.model_copy(update={"gate": ClosedGate()}), prefill=prefill):
            with pytest.raises(KeyError, match="stop"):
                write(model, ids, logits_processor=[fail])
            assert torch.allclose(want, model(ids).logits, rtol=0, atol=1e-10)


NAMES = ("generate", "_get_candidate_generator", "_get_stopping_criteria", "prepare_inputs_for_generation")


@pytest.mark.parametrize("undo", ["handle", "function", "context"])
def test_undone(undo):
    model, ids = tiny_model("llama"), text(60)
    before, want = set(vars(model)), write(model, ids)
    with patchattn.draft(model, POLICY) as handle:
        assert set(NAMES) <= set(vars(model))
        if undo == "handle":
            handle.unpatch()
        elif undo == "function":
            patchattn.unpatch(model)
    assert set(vars(model)) == before
    assert not patchattn.is_patched(model)
    assert torch.equal(write(model, ids), want)
    with patchattn.patch(model, POLICY) as handle:
        write(model, ids)
    assert handle.report().drafts is None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_drafts_by_itself(how):
    model, ids = tiny_model("llama"), text(100)
    want = write(model, ids)
    handle = patchattn.draft(model, POLICY, tokens=3)
    other = how(model)
    handle.unpatch()
    assert torch.equal(write(other, ids), want)
    states = [module._modules["patchattn_layer"] for module in other.modules() if "patchattn_layer" in module._modules]
    assert states[0].drafting.counts.rounds > 0
    assert handle.report().drafts.rounds == 0
    layer = copy.deepcopy(copy.deepcopy(other.model.layers[0]))
    assert layer.self_attn.patchattn_layer.drafting.model is None
    patchattn.unpatch(other)
    assert not set(NAMES) & set(vars(other))


REFUSED_CALLS = {
    "beams": ({"num_beams": 2}, "beam search"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "others are asked for beside it"),
    "assistant": ({"assistant_model": tiny_model("llama")}, "an assistant_model is given beside it"),
    "ensemble": ({"assistant_ensemble_weight": 0.5}, "keeps tokens that dense attention would not"),
    "no cache": ({"use_cache": False}, "use_cache is False"),
    "several": ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences is 2"),
    "custom": ({"custom_generate": print}, "custom_generate"),
    "quantised": ({"cache_implementation": "quantized"}, "Quantised caches"),
    "paged": ({"cache_implementation": "paged"}, "Continuous batching"),
}


@pytest.mark.parametrize("case", REFUSED_CALLS)
def test_refused_calls(case):
    options, reason = REFUSED_CALLS[case]
    with (
        patchattn.draft(tiny_model("llama"), POLICY) as handle,
        pytest.raises(UnsupportedCallError, match=reason) as error,
    ):
        write(handle.model, text(40), **options)
    assert error.value.fix


def test_a_configuration_given_in_place_is_looked_at():
    ids, plain = text(60), GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=None)
    with patchattn.draft(tiny_model("llama"), POLICY, tokens=2) as handle:
        got = handle.model.generate(ids, plain)
        with pytest.raises(UnsupportedCallError, match="beam search"):
            handle.model.generate(ids, GenerationConfig(max_new_tokens=9, num_beams=2))
    assert torch.equal(got, tiny_model("llama").generate(ids, plain))
    assert handle.report().drafts.rounds > 0


def test_refused_texts():
    with patchattn.draft(tiny_model("llama"), POLICY) as handle:
        model = handle.model
        with pytest.raises(UnsupportedCallError, match="takes one text, and these are 2"):
            write(model, text(40).expand(2, -1))
        with pytest.raises(UnsupportedCallError, match="inputs_embeds has none"):
            write(model, None, inputs_embeds=torch.zeros(1, 4, 96))
        with pytest.raises(UnsupportedCallError, match="Continuous batching"):
            model.generate_batch([[1, 2, 3]])
        (name,) = with_cache(model, None)
        cache = DynamicCache()
        model(text(50), **{name: cache})
        mask = torch.ones(1, 60, dtype=torch.long)
        with pytest.raises(UnsupportedCallError, match="60 tokens and brings only 10"):
            write(model, text(10), attention_mask=mask, **{name: cache})


@HAS_STATIC
def test_a_static_cache_with_sliding_layers_is_refused():
    with (
        patchattn.draft(tiny_model("gemma2"), POLICY) as handle,
        pytest.raises(UnsupportedCallError, match="where layers slide"),
    ):
        write(handle.model, text(60), cache_implementation="static")


@pytest.mark.skipif(hasattr(StaticLayer, "crop"), reason="static caches can be cropped from 5.24 on")
def test_a_static_cache_is_refused_before_it_can_be_cropped():
    with (
        patchattn.draft(tiny_model("llama"), POLICY) as handle,
        pytest.raises(UnsupportedCallError, match=r"from transformers 5\.24 on"),
    ):
        write(handle.model, text(60), cache_implementation="static")


def test_refused_models_and_policies():
    model = tiny_model("minimax")
    with pytest.raises(patchattn.UnsupportedModelError, match="recurrent layers"):
        patchattn.draft(model)
    assert not patchattn.is_patched(model)
    assert "generate" not in vars(model)
    model = tiny_model("llama")
    with pytest.raises(patchattn.UnsupportedModelError, match="no generate"):
        patchattn.draft(model.model)
    only = {"phases": frozenset({"prefill"})}
    for options, reason in (
        ({"policy": POLICY.model_copy(update=only)}, "leaves out decode"),
        ({"prefill": "gated"}, "leaves out prefill"),
        ({"prefill": "both"}, "Unknown prefill 'both'"),
        ({"tokens": 0}, "got 0"),
        ({"tokens": True}, "got True"),
        ({"tokens": 2.0}, "got 2.0"),
    ):
        with pytest.raises(PolicyError, match=reason):
            patchattn.draft(model, **options)
        assert not patchattn.is_patched(model)
    with patchattn.draft(model), pytest.raises(patchattn.PatchStateError):
        patchattn.draft(model)


def test_a_short_text_is_not_drafted():
    want, got, report = both("llama", text(40), POLICY.model_copy(update={"window_size": 64}), new=20)
    assert torch.equal(want, got)
    assert report.drafts.without_draft == {"short": 18, "last token": 1}
    assert "18 (short)" in str(report)


@pytest.mark.parametrize("window", [3, pytest.param(64, marks=pytest.mark.slow)])
def test_gates_of_a_draft_are_those_of_gated_steps_on_the_dense_cache(window, monkeypatch):
    """Past several chunks of moments, with crops on both sides of their ends, and rounds that are not drafted between.

    A window shorter than the draft is where a crop reaches what moments may cover. Elsewhere no chunk is summed twice.
    """
    policy = POLICY.model_copy(update={"window_size": window, "phases": frozenset({"decode"})})
    model, ids = tiny_model("llama").double(), text(window + 4 + 120, 7)
    dense = copy.deepcopy(model)
    rounds = []
    draft = Candidates._draft

    def noted(self, input_ids, model_kwargs, length):
        if len(rounds) in (3, 20):
            rounds.append(None)
            return input_ids, []
        drafted = draft(self, input_ids, model_kwargs, length)
        rounds.append(drafted[0])
        return drafted

    rewound, afresh = PromptMoments.rewound, []

    def counted(self, chunks):
        afresh.append(bool((self.chunks > chunks).any()))
        return rewound(self, chunks)

    monkeypatch.setattr(Candidates, "_draft", noted)
    monkeypatch.setattr(PromptMoments, "rewound", counted)
    with patchattn.draft(model, policy, tokens=5) as handle:
        for state in handle.states.values():
            state.record = "timeline"
        write(model, ids, new=170)
    report = handle.report()
    assert 0 < report.drafts.accepted < report.drafts.drafted
    assert 0 < report.open_fraction("decode") < 1
    if window > 10:
        assert set(report.rebuilt_by_reason()) <= {"never kept"}
        assert afresh
        assert not any(afresh)
    got = {layer: [opened for _, opened in calls] for layer, calls in report.timeline.items()}
    (name,) = with_cache(model, None)
    at = 0
    with patchattn.patch(model, policy, record="timeline") as handle:
        for drafted in rounds:
            if drafted is None or drafted.shape[1] > ids.shape[1] + 160:
                continue  # the last drafts are shorter
            cache, known = DynamicCache(), drafted.shape[1] - 5
            dense(drafted[:, : known - 1], **{name: cache})
            handle.reset_report()
            for step in range(5):
                model(drafted[:, known - 1 + step : known + step], **{name: cache})
            for layer, calls in handle.report().timeline.items():
                found = zip(calls, got[layer][at : at + 5], strict=True)
                assert all(torch.equal(want, opened) for (_, want), opened in found)
            at += 5
    assert at > 100


@HAS_STATIC
@pytest.mark.slow
def test_compiled_drafts_and_what_verifies_them_are_compiled_once():
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True  # transformers leaves CPU out
    model, ids = tiny_model("llama"), text(60)
    want = write(model, ids)
    with patchattn.draft(model, POLICY.model_copy(update={"gate": ClosedGate()}), tokens=3) as handle:
        graphs = []
        for _ in range(2):
            got = write(model, ids, cache_implementation="static", compile_config=compiling)
            assert torch.equal(got, want)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert handle.report().open_fraction("decode") == 0
