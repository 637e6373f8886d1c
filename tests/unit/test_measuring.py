"""Tests of `patchattn.measuring`: the sums are those of the definitions, whatever way they were reached."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import patchattn
from patchattn import CalibrationError, CalibrationMismatchError, MomentGate, OracleGate, Policy, RiskTarget
from patchattn.backends.reference import attend
from patchattn.calibration import Rotary
from patchattn.call.inputs import AttentionInputs
from patchattn.call.masses import attention_scores, masked_log_mass
from patchattn.call.regions import Regions
from patchattn.gates.decision import all_open
from patchattn.measuring.collect import calibrate, settings_of
from patchattn.measuring.documents import cut_documents
from patchattn.measuring.find_rotary import find_rotary
from patchattn.measuring.statistics import MARGINS, Settings, Totals, closed_sums
from patchattn.measuring.tensors import _half_upwards
from patchattn.moments.gaussian import KeyMoments
from patchattn.moments.prompt import bulk_log_mass_from_prompt
from patchattn.moments.text import Rotation
from patchattn.testing import tiny_model
from patchattn.testing.models import FAMILIES

POLICY = Policy(sink_size=4, window_size=32, gate=MomentGate(threshold=RiskTarget(alpha=0.3)))


OTHER_TEXT = POLICY.model_copy(
    update={"gate": MomentGate(threshold=RiskTarget(alpha=0.3), moments="calibration"), "min_bulk": 0}
)


class Letters:
    """A tokenizer of one token for each character."""

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [2 + ord(letter) % 120 for letter in text]}


def texts(count: int = 6, length: int = 330) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 120, (count, length), generator=generator)
    return ["".join(map(chr, row)) for row in ids.tolist()]


def measure(model=None, *, policy=POLICY, **fields):
    model = tiny_model("llama") if model is None else model
    return calibrate(model, Letters(), texts(), policy, **({"lengths": (300,), "corpus": "letters"} | fields))


def test_documents_begin_as_the_tokenizer_begins_a_text() -> None:
    class NamesAStart(Letters):
        """As those of chat models, whose start token is their template's."""

        bos_token_id = 1

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return super().__call__(text, **options | {"add_special_tokens": False})

    for tokenizer, first in ((Letters(), [1]), (NamesAStart(), [])):
        found = cut_documents(tokenizer, ["a" * 700], (300,), documents=None, seed=0, local=(4, 32))
        assert [ids.tolist() for ids in found] == [first + [99] * (300 - len(first))] * 2


def make_inputs(length=400, *, softcap=None, sinks=False, spread=1.5) -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    regions = Regions.of(torch.ones(1, length), query_length=length, sink_size=4, window_size=32)
    query, key, value = spread * normal(1, 6, length, 16), normal(1, 2, length, 16) + 0.3, normal(1, 2, length, 8)
    return AttentionInputs(query, key, value, regions, 0.25, softcap, normal(6) if sinks else None)


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (3.0, False), (None, True)])
def test_sums_of_a_call_are_those_of_the_definitions(softcap, sinks, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several slabs.
    monkeypatch.setattr(patchattn.call.masses, "_SCORES_PER_SLAB_ON_HOST", 6 * 400 * 50)
    inputs = make_inputs(softcap=softcap, sinks=sinks)
    settings = Settings((3,), 6, 2, 16, key_moments=True, oracle_margin=0.4)
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.0, 0.0, 0.0]))
    totals = Totals(settings, rotations={3: rotation})
    output = totals.add_document(1).attend(3, inputs).output
    torch.testing.assert_close(output, dense_output(inputs), rtol=1e-10, atol=1e-10)

    scores = attention_scores(inputs)
    local = masked_log_mass(scores, inputs.regions.local_mask()[:, None], inputs.sink_logits)
    bulk = masked_log_mass(scores, inputs.regions.bulk_mask()[:, None], None)
    asked = inputs.regions.asked[0]
    share = torch.sigmoid(bulk - local)[0][:, asked]
    needed = (local - bulk)[0][:, asked] < 0.4
    for index, estimate in enumerate(("guarded", "saturating", "lognormal")):
        mass, _ = bulk_log_mass_from_prompt(inputs, estimate=estimate)
        margin = (local - mass)[0][:, asked]
        rungs = [-math.inf, *MARGINS.tolist(), math.inf]
        for rung in (0, 1, 20, 30, len(rungs) - 2, len(rungs) - 1):
            # The first rung closes every query, whatever the estimate, the last one none.
            closed = margin >= rungs[rung] if 0 < rung < len(rungs) - 1 else torch.full_like(needed, rung == 0)
            missed = totals.sums["missed_mass"][1, index, 0, :, rung]
            torch.testing.assert_close(missed, (share * closed).mean(-1), rtol=1e-9, atol=1e-12)
            opened = totals.sums["open_fraction"][index, 0, :, rung]
            torch.testing.assert_close(opened, (~closed).double().mean(-1), rtol=1e-9, atol=1e-12)
            assert torch.equal(totals.sums["hits"][index, 0, :, rung], (~closed & needed).sum(-1).double())
        known = mass.isfinite()[0][:, asked]
        error = torch.where(known, (mass - bulk)[0][:, asked], 0)
        torch.testing.assert_close(totals.sums["errors"][1, index, 0], error.sum(-1), rtol=1e-9, atol=1e-9)
    assert torch.equal(totals.sums["oracle_pairs"][0], needed.sum(-1).double())
    assert (totals.sums["missed_mass"][0] == 0).all()
    # Keys that are the bulk of the last query, each turned back by its own slot.
    count = 400 - 4 - 32
    want = KeyMoments.of(rotation.undone(inputs.key[0, :, 4 : 4 + count], torch.arange(4, 4 + count)))
    assert totals.sums["key_count"].tolist() == [count]
    mean, outer = totals.sums["key_total"][0] / count, totals.sums["key_outer"][0] / count
    torch.testing.assert_close(mean, want.mean)
    torch.testing.assert_close(outer - mean[..., :, None] * mean[..., None, :], want.covariance)


def test_a_margin_on_the_grid_closes_from_there_on() -> None:
    margin = torch.stack([MARGINS[10], MARGINS[10] - 1e-3, torch.tensor(torch.nan), torch.tensor(torch.inf)])[None]
    closed = closed_sums(margin, torch.tensor([[1.0, 10.0, 100.0, 1000.0]], dtype=torch.float64))[0]
    # Rung 0 closes everything, rung 11 from the eleventh margin on, the last one nothing.
    assert closed[[0, 10, 11, 12, -2, -1]].tolist() == [1111, 1011, 1001, 1000, 1000, 0]


def local_sizes():
    return {"sink_size": 4, "window_size": 32}


def dense_output(inputs: AttentionInputs) -> torch.Tensor:
    return attend(inputs, all_open(inputs), 0.0).output


def test_nan_opens_and_extreme_masses_do_not_break_the_sums() -> None:
    inputs = make_inputs(spread=60.0)
    totals = Totals(Settings((0,), 6, 2, 16, key_moments=False, oracle_margin=0.4))
    assert totals.add_document(0).attend(0, inputs).output.isfinite().all()
    for values in totals.sums.values():
        assert values.isfinite().all()


def test_the_calibration_agrees_with_what_the_patched_model_does() -> None:
    # In the first layer the patched model has the activations of the dense one, so open fractions must agree.
    model = tiny_model("llama")
    calibration = measure(model)
    margin = -2.5
    share = torch.tensor(margin, dtype=torch.float64).sigmoid().item()
    want = calibration.expected(torch.full((3, 6), margin)).open_fraction[0]
    policy = POLICY.model_copy(update={"gate": MomentGate(threshold=share), "min_bulk": 0})
    with patchattn.patch(model, policy) as handle, torch.no_grad():
        for text in texts():
            ids = Letters()(text)["input_ids"][:300]
            model(torch.tensor([ids]), use_cache=False)
    got = torch.tensor(handle.report().head_open_fractions("prefill")[0])
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    assert 0.05 < got.mean() < 0.95


def test_documents_are_cut_in_turn_and_the_manifest_says_what_was_measured() -> None:
    calibration = calibrate(
        tiny_model("llama"),
        Letters(),
        ["a" * 600, "b" * 90, "c" * 30, "d" * 250],
        POLICY,
        lengths=(200, 100),
        corpus="letters",
        model_name="org/tiny",
    )
    # 3 of 200 tokens, 1 of 91, none of 31 (too short), 2 of 100.
    assert calibration.manifest.n_documents == 6
    assert calibration.manifest.corpus.tokens == 600 - 3 + 3 + 91 - 1 + 1 + 200 - 3 + 3
    assert calibration.manifest.model == "org/tiny"
    assert calibration.manifest.rotary == Rotary(layout="halves", first=0, size=16)
    assert calibration.manifest.moment_documents == 6
    assert calibration.policy == POLICY


def test_two_runs_are_the_same_and_another_seed_is_not() -> None:
    first, again, other = measure(documents=4), measure(documents=4), measure(documents=4, seed=1)
    assert first.manifest == again.manifest
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert first.manifest.corpus.sha256 != other.manifest.corpus.sha256


def test_progress_is_shown_with_the_time_left(capfd: pytest.CaptureFixture[str]) -> None:
    measure(documents=2, progress=True)
    shown = capfd.readouterr().err
    assert "measuring documents" in shown
    assert "2/2" in shown
    measure(documents=2)
    assert "measuring" not in capfd.readouterr().err


def interleaved_model():
    """A family whose rotary embedding turns neighbours together."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 130}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 512}
    return CohereForCausalLM(CohereConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "cohere"])
def test_keys_are_turned_back_whatever_the_rotary_embedding(family: str) -> None:
    model = interleaved_model() if family == "cohere" else tiny_model(family)
    settings, fingerprint = settings_of(model, POLICY, (300,), 0.6, key_moments=True)
    found = find_rotary(model, settings.layers, 300)
    assert found is not None
    assert found.rotary.layout == ("interleaved" if family == "cohere" else "halves")
    assert found.rotary.size == {"deepseek_v3": 8, "gpt_neox": 4}.get(family, fingerprint.head_dim)
    turned = [layer for layer, rotation in found.rotations.items() if rotation.frequencies.any()]
    assert turned == {"cohere2": [], "smollm3": [0, 1]}.get(family, list(settings.layers))


def rotary_of(model, longest=300):
    settings, _ = settings_of(model, POLICY, (longest,), 0.6, key_moments=True)
    return find_rotary(model, settings.layers, longest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "smollm3"])
def test_rounding_does_not_hide_the_rotary_embedding_of_deep_models(family: str, dtype: torch.dtype) -> None:
    sizes = {"num_hidden_layers": 30}
    if family in ("gemma3_text", "gpt_oss"):
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * 15
    if family == "smollm3":
        sizes["no_rope_layers"] = [1, 1, 0] * 10
    found = rotary_of(tiny_model(family, dtype=dtype, **sizes))
    assert found is not None
    assert (found.rotary.layout, found.rotary.size) == ("halves", {"deepseek_v3": 8}.get(family, 16))
    still = [layer for layer, rotation in found.rotations.items() if not rotation.frequencies.any()]
    assert still == (list(range(2, 30, 3)) if family == "smollm3" else [])


@pytest.mark.parametrize("longest", [100, 300])
def test_frequencies_that_depend_on_the_length_of_the_call_are_not_known(longest: int) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=128)
    # Also where no document is long enough to see it: later prompts are.
    assert rotary_of(model, longest) is None
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=4096)
    assert rotary_of(model, longest) is not None


def test_models_whose_keys_are_turned_in_unknown_ways_have_no_key_moments() -> None:
    model = tiny_model("llama")
    rotate = model.model.rotary_emb.forward
    # Frequencies that grow with the position, as no list of them can say.
    model.model.rotary_emb.forward = lambda x, position_ids: rotate(x, position_ids * position_ids)
    with pytest.warns(UserWarning, match="will have no key moments"):
        assert measure(model, documents=1).manifest.rotary is None
    with pytest.raises(CalibrationError, match="no moments of other text"):
        measure(model, policy=OTHER_TEXT)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_missed_mass_is_never_rounded_down(values: list[float]) -> None:
    exact = torch.tensor(values, dtype=torch.float64)
    rounded = _half_upwards(exact)
    assert rounded.dtype == torch.float16
    assert (rounded.double() >= exact).all()
    assert (rounded.double() - exact <= 2**-10 * exact + 2**-24).all()
    assert rounded.max() <= 1


class Killed(Exception):
    pass


@pytest.mark.parametrize(("policy", "last"), [(POLICY, 3), (OTHER_TEXT, 1), (OTHER_TEXT, 3)])
def test_a_broken_run_goes_on_from_the_last_finished_document(policy, last, tmp_path: Path) -> None:
    kept = tmp_path / "sums"
    finished = []

    def die(done: int, of: int) -> None:
        finished.append(done)
        if done == last:
            raise Killed

    model = tiny_model("llama")
    with pytest.raises(Killed):
        measure(model, policy=policy, checkpoint=kept, progress=die)
    assert not patchattn.is_patched(model)
    assert kept.exists()
    resumed = measure(model, policy=policy, checkpoint=kept, progress=lambda done, of: finished.append(done))
    assert finished == [1, 2, 3, 4, 5, 6]
    assert not kept.exists()
    whole = measure(model, policy=policy)
    assert resumed.manifest == whole.manifest
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)


MEASURE_FOREVER = """
import sys, time
sys.path[:0] = [{here!r}]
from test_measuring import measure

def tell(done, of):
    print(done, flush=True)
    # Long enough for the kill to come, between two documents or within one.
    time.sleep(0 if done < 3 else 60)

measure(checkpoint={kept!r}, progress=tell)
"""


def test_a_killed_process_leaves_a_checkpoint_that_another_goes_on_from(tmp_path: Path) -> None:
    kept = tmp_path / "sums"
    code = MEASURE_FOREVER.format(here=str(Path(__file__).parent), kept=str(kept))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert told == ["1\n", "2\n", "3\n"]
    assert process.returncode == -signal.SIGKILL
    finished = []
    resumed = measure(checkpoint=kept, progress=lambda done, of: finished.append(done))
    assert finished == [4, 5, 6]
    whole = measure()
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_thresholds_measured_with_moments_of_other_text_are_for_those() -> None:
    model = tiny_model("llama")
    calibration = measure(model, policy=OTHER_TEXT)
    manifest = calibration.manifest
    # The fifth of six documents in the drawn order gives moments only.
    assert (manifest.moments, manifest.moment_documents, manifest.documents) == ("calibration", 1, (3, 2))
    share, margin = 0.1, math.log(0.1) - math.log(0.9)
    want = calibration.expected(torch.full((3, 6), margin)).open_fraction[0]
    gate = MomentGate(threshold=share, moments="calibration")
    fractions = []
    with patchattn.patch(model, POLICY.model_copy(update={"gate": gate, "min_bulk": 0}), calibration=calibration) as h:
        for ids in cut_documents(Letters(), texts(), (300,), documents=None, seed=0, local=(4, 32)):
            h.reset_report()
            with torch.no_grad():
                model(ids[None], use_cache=False)
            fractions.append(torch.tensor(h.report().head_open_fractions("prefill")[0]))
    del fractions[4]
    # In the first layer the patched model has the activations of the dense one. The margin lies between two of the
    # grid, so the curve at the next ones bounds it.
    above = calibration.expected(torch.full((3, 6), margin + 0.25)).open_fraction[0]
    got = torch.stack(fractions).mean(0)
    assert (want - 1e-3 <= got).all()
    assert (got <= above + 1e-3).all()
    assert 0.05 < float(want.mean()) < 0.95
    with patchattn.patch(model, calibration=calibration) as handle:
        assert handle.policy.gate == OTHER_TEXT.gate


def test_targets_with_moments_that_were_not_measured_are_refused() -> None:
    model = tiny_model("llama")
    for policy, other in ((POLICY, OTHER_TEXT), (OTHER_TEXT, POLICY)):
        calibration = measure(model, policy=policy)
        with pytest.raises(CalibrationMismatchError, match="were measured with moments=") as caught:
            patchattn.patch(model, other, calibration=calibration)
        assert other.gate.moments in caught.value.message.split("asks for")[1]
        assert not patchattn.is_patched(model)
        with pytest.raises(CalibrationMismatchError):
            patchattn.Calibration(calibration.manifest, other, calibration.tensors)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "sums"

    def die(*_: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        measure(checkpoint=kept, progress=die)
    with pytest.raises(CalibrationError, match="of a run with another model"):
        measure(checkpoint=kept, seed=1)
    kept.write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="can't be read"):
        measure(checkpoint=kept)


def test_what_cannot_be_measured_is_refused_with_the_model_untouched() -> None:
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match="0 documents of more than 36 tokens"):
        calibrate(model, Letters(), ["short"], POLICY, lengths=(300,))
    with pytest.raises(CalibrationError, match=r"6 documents of more than 36 tokens .*; 7 were asked for"):
        measure(model, documents=7)
    with pytest.raises(CalibrationError, match="no keys beyond sink 4 and window 32"):
        measure(model, lengths=(36,))
    with pytest.raises(CalibrationError, match="reads at most 4,096 tokens"):
        measure(model, lengths=(300, 10**6))
    with pytest.raises(CalibrationError, match="needs 5 documents or more"):
        measure(model, policy=OTHER_TEXT, documents=4)
    with pytest.raises(CalibrationError, match="key_moments is False"):
        measure(model, policy=OTHER_TEXT, key_moments=False)
    with pytest.raises(CalibrationError, match="oracle_threshold"):
        measure(model, oracle_threshold=1.0)
    with pytest.raises(patchattn.UnsupportedModelError):
        calibrate(torch.nn.Linear(2, 2), Letters(), texts(), POLICY)
    model.train()
    with pytest.raises(CalibrationError, match="training mode"):
        measure(model)
    model.eval()._device_mesh = object()
    with pytest.raises(CalibrationError, match="tensor parallelism"):
        measure(model)
    assert not patchattn.is_patched(model)


def test_curves_of_an_oracle_policy_are_those_of_prompt_moments() -> None:
    oracle = POLICY.model_copy(update={"gate": OracleGate()})
    first, second = (
        measure(documents=2),
        calibrate(tiny_model("llama"), Letters(), texts(), oracle, lengths=(300,), documents=2),
    )
    assert torch.equal(first.tensors["missed_mass"], second.tensors["missed_mass"])
