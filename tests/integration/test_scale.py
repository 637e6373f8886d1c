"""Patched models in the hands of other libraries: offloaded weights, adapters, pipelines, tensor parallelism."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ranks import run_on_two

import patchattn
from patchattn import MomentGate, OpenGate, Policy, StaticGate
from patchattn.evaluation.loss import losses
from patchattn.testing import assert_equivalent, assert_within_budget, recorded_gates, replay_gates, tiny_model

MOMENTS = MomentGate(threshold=0.2, estimate="saturating")
STATIC = StaticGate(open_heads=((0, 1), (1, 2), (1, 4), (2, 0)))
NEW_TOKENS = 8


def policy(gate):
    return Policy(sink_size=4, window_size=32, min_bulk=0, gate=gate)


def prompt(batch=2, length=300):
    return torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def generate(model, ids, **kwargs):
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs
    )


def forward(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_mixed(report):
    for phase in ("prefill", "decode"):
        assert 0 < report.open_fraction(phase) < 1
    assert not any(report.dense_calls.values())


def offloaded(where, folder):
    """Return a tiny model whose weights accelerate fetches for each call."""
    from accelerate import cpu_offload, disk_offload
    from transformers import AutoModelForCausalLM

    model, device = tiny_model("llama"), torch.device("cpu")
    if where == "cpu":
        cpu_offload(model, execution_device=device)
    elif where == "disk":
        disk_offload(model, folder / "weights", execution_device=device)
    else:
        model.save_pretrained(folder / "model")
        parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        parts |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", device_map=parts, offload_folder=folder / "weights", dtype=torch.float32
        ).eval()
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


# transformers 5.17 compares the device of the ids with that of offloaded weights, which is meta.
of_offloaded_weights = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")


@of_offloaded_weights
@pytest.mark.parametrize("where", ["cpu", "disk", "device_map"])
def test_offloaded_weights(where, tmp_path):
    ids = prompt()
    with patchattn.patch(tiny_model("llama"), policy(MOMENTS)) as handle:
        want = generate(handle.model, ids)
    counts = handle.report().layers
    model = offloaded(where, tmp_path)
    stock = generate(model, ids)
    assert patchattn.check_support(model)
    with patchattn.patch(model, policy(MOMENTS)) as handle:
        got = generate(model, ids)
    assert torch.equal(got, want)
    assert_mixed(handle.report())
    assert handle.report().layers == counts
    assert not torch.equal(got, stock)
    assert torch.equal(generate(model, ids), stock)
    # Undone: nothing of the library is left for accelerate to fetch or to place.
    assert not any("patchattn" in name for name, _ in model.named_modules())
    assert any(parameter.is_meta for parameter in model.parameters())


def test_offloaded_weights_can_be_measured(tmp_path):
    # Tokens belong where the embedding computes, not on the meta device where its weights are.
    model, tokens = offloaded("disk", tmp_path), prompt()[0].tolist()
    assert torch.equal(losses(model, tokens), losses(tiny_model("llama"), tokens))
    assert assert_equivalent(model, policy(MOMENTS)).logit_error <= 1


@of_offloaded_weights
def test_a_patched_model_can_be_offloaded_afterwards(tmp_path):
    from accelerate import disk_offload

    ids = prompt()
    model = tiny_model("llama")
    handle = patchattn.patch(model, policy(MOMENTS))
    want = generate(model, ids)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    handle.reset_report()
    assert torch.equal(generate(model, ids), want)
    assert_mixed(handle.report())
    handle.unpatch()
    assert torch.equal(generate(model, ids), generate(tiny_model("llama"), ids))


def test_weights_that_nothing_fetches_are_refused():
    from accelerate import cpu_offload

    model = tiny_model("llama").to("meta")
    with pytest.raises(patchattn.UnsupportedModelError, match="meta device"):
        patchattn.patch(model, policy(OpenGate()))
    model = tiny_model("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(96, 128, bias=False, device="meta")
    assert "meta device" in str(patchattn.check_support(model))
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_buffer("packed", torch.zeros(2, dtype=torch.int32, device="meta"))
    assert "meta device" in str(patchattn.check_support(model))


# peft 0.21 asks for an attribute that transformers 5.23 has renamed.
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapted():
    """A tiny model in a LoRA wrapper whose adapter is not the identity."""
    peft = pytest.importorskip("peft", reason="needs peft, which is not installed")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return peft.get_peft_model(tiny_model("llama"), config).eval()


@peft_warns
def test_adapters_equal_the_stock_model_with_open_gates(adapted):
    ids = prompt()
    plain, truth = forward(adapted, ids), forward(copy.deepcopy(adapted).double(), ids)
    names = list(adapted.state_dict())
    with patchattn.patch(adapted, policy(OpenGate())) as handle:
        assert_within_budget(forward(adapted, ids), plain, truth)
        assert list(adapted.state_dict()) == names
        with adapted.disable_adapter():
            assert_within_budget(
                forward(adapted, ids),
                forward(tiny_model("llama"), ids),
                forward(tiny_model("llama").double(), ids),
                "without the adapter",
            )
    assert handle.report().open_fraction() == 1.0
    assert torch.equal(forward(adapted, ids), plain)
    assert not torch.allclose(plain, forward(tiny_model("llama"), ids), atol=1e-2)


@peft_warns
def test_adapters_equal_the_reference_with_mixed_gates(adapted):
    ids = prompt()
    with patchattn.patch(adapted, policy(MOMENTS), record="timeline") as handle:
        got, tokens = forward(adapted, ids), generate(adapted, ids)
    assert_mixed(handle.report())
    gates = {layer: calls[:1] for layer, calls in recorded_gates(handle).items()}
    results = []
    for twin in (adapted, copy.deepcopy(adapted).double()):
        with patchattn.patch(twin, policy(MOMENTS), backend="reference") as handle:
            replay_gates(handle, gates)
            results.append(forward(twin, ids))
    assert_within_budget(got, *results)
    # The model inside may be named too, and adapters merged into it.
    inside = adapted.get_base_model()
    with patchattn.patch(inside, policy(MOMENTS)):
        assert torch.equal(generate(adapted, ids), tokens)
    plain = forward(adapted, ids)
    merged = adapted.merge_and_unload()
    with patchattn.patch(merged, policy(OpenGate())):
        assert torch.allclose(forward(merged, ids), plain, atol=1e-3)


def tokenizer():
    """A tokenizer that knows the numbers 0 to 127 as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(number): number for number in range(128)}, unk_token="1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", unk_token="1", padding_side="left")


def test_pipelines_run_the_patched_model():
    from transformers import pipeline

    texts = [" ".join(map(str, row[:length].tolist())) for row, length in zip(prompt(3), (300, 240, 180), strict=True)]
    model = tiny_model("llama")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer())
    options = {"max_new_tokens": NEW_TOKENS, "max_length": None, "do_sample": False, "return_full_text": False}
    stock = write(texts, batch_size=3, **options)
    with patchattn.patch(model, policy(OpenGate())) as handle:
        assert write(texts, batch_size=3, **options) == stock
        assert handle.report().open_fraction("decode") == 1.0
    with patchattn.patch(model, policy(MOMENTS)) as handle:
        together = write(texts, batch_size=3, **options)
        assert_mixed(handle.report())
        one_by_one = write(texts, **options)
    assert together == one_by_one
    assert together != stock
    assert write(texts, batch_size=3, **options) == stock


RANK = """
import json, os, sys
sys.path.insert(0, sys.argv[2])
import torch, transformers
from test_scale import gated_runs

transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, tp_plan="auto").eval()
# One write: lines of ranks must not mix.
os.write(1, ("RESULT " + json.dumps(gated_runs(model)) + "\\n").encode())
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def gated_runs(model):
    """Tokens, open fraction per head and dense calls, for a gate that decides and one that names its heads."""
    results = []
    for gate in (MOMENTS, STATIC):
        with patchattn.patch(model, policy(gate)) as handle:
            tokens = generate(model, prompt()).tolist()
        report = handle.report().to_dict()
        heads = {phase: counts["heads"] for phase, counts in report["phases"].items()}
        results.append({"tokens": tokens, "heads": heads, "dense": any(report["dense_calls"].values())})
    return results


@pytest.mark.slow
def test_tensor_parallelism_gives_the_tokens_of_one_process(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "rank.py").write_text(RANK)
    lines = run_on_two(tmp_path, str(tmp_path / "model"), str(Path(__file__).parent), timeout=240)
    alone, ranks = gated_runs(tiny_model("llama")), [json.loads(line) for line in lines]
    assert len(ranks) == 2
    for number, one in enumerate(alone):
        slices = [rank[number] for rank in ranks]
        for part in slices:
            assert part["tokens"] == one["tokens"]
            assert not part["dense"]
        # Ranks may print in either order; each holds half of the heads, and a static gate names them over all ranks.
        for phase in ("prefill", "decode"):
            halves = [part["heads"][phase] for part in slices]
            together = [{layer: a[layer] + b[layer] for layer in a} for a, b in (halves, halves[::-1])]
            assert one["heads"][phase] in together
            shares = [share for heads in one["heads"][phase].values() for share in heads]
            assert 0 < sum(shares) < len(shares)
    assert alone[0]["tokens"] != alone[1]["tokens"]
