"""Models with quantised weights: the dtype and the device of attention are not those of the weights."""

import pytest
import torch
from torch import nn

import patchattn
from patchattn import MomentGate, OpenGate, Policy
from patchattn.evaluation.answers import write
from patchattn.evaluation.loss import losses
from patchattn.evaluation.runner import _about_model
from patchattn.hf.fingerprint import fingerprint_of
from patchattn.testing import assert_equivalent, assert_within_budget, tiny_model

DTYPES = (torch.float32, torch.bfloat16)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# A size that every kind of quantisation takes whole.
SIZES = {"hidden_size": 128, "num_attention_heads": 8}


class BufferLinear(nn.Module):
    """A linear layer with int8 weights and float scales, all of them buffers, as GPTQ, AWQ and EETQ have."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().float().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        # Wider than the activations in a model of 16 bits: scales do not tell the dtype.
        self.register_buffer("scales", scale)

    def forward(self, x):
        return nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype))


def with_buffers(dtype=torch.float32, names=PROJECTIONS):
    """Return a tiny model whose attention has no parameters."""
    model = tiny_model("llama", dtype=dtype, **SIZES)
    for layer in model.model.layers:
        for name in names:
            setattr(layer.self_attn, name, BufferLinear(getattr(layer.self_attn, name)))
    return model


def policy(gate):
    return Policy(sink_size=4, window_size=16, min_bulk=0, gate=gate)


def prompt(length=200):
    return torch.randint(2, 120, (2, length), generator=torch.Generator().manual_seed(0))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def generate(model, ids):
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)


def exact(model):
    """Return a model in float64 with the weights that quantised layers stand for: what they make of unit vectors."""
    plain = tiny_model("llama", dtype=torch.float64, **SIZES)
    for name, part in plain.named_modules():
        own = model.get_submodule(name)
        if isinstance(part, nn.Linear):
            units = torch.eye(part.in_features, dtype=model.model.norm.weight.dtype)
            part.weight.data = own(units).detach().double().T
        elif isinstance(part, nn.Embedding) or name.endswith("norm"):
            part.weight.data = own.weight.detach().double()
    return plain


def assert_open_gates_change_nothing(model, dtype, *, weights_only=True):
    """Compare with the stock model; `weights_only` says that the layers don't round their inputs."""
    ids = prompt()
    stock, tokens = logits(model, ids), generate(model, ids)
    assert stock.dtype == dtype
    assert patchattn.check_support(model)
    with patchattn.patch(model, policy(OpenGate())) as handle:
        got, patched_tokens = logits(model, ids), generate(model, ids)
    report = handle.report()
    assert report.open_fraction() == 1.0
    assert not any(report.dense_calls.values())
    assert {shape.dtype for shape in report.shapes.values()} == {str(dtype).removeprefix("torch.")}
    assert str(report)
    assert_within_budget(got, stock, logits(exact(model), ids))
    if dtype == torch.float32 and weights_only:
        assert torch.equal(patched_tokens, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_in_buffers(dtype):
    model = with_buffers(dtype)
    assert not list(model.model.layers[0].self_attn.parameters())
    assert_open_gates_change_nothing(model, dtype)


# torch 2.13 deprecates this quantisation, in favour of torchao's, but has it.
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
def test_dynamically_quantised_layers():
    # Their weights are neither parameters nor buffers.
    model = torch.ao.quantization.quantize_dynamic(tiny_model("llama", **SIZES), {nn.Linear}, dtype=torch.qint8)
    assert not [*model.model.layers[0].self_attn.parameters(), *model.model.layers[0].self_attn.buffers()]
    assert_open_gates_change_nothing(model, torch.float32, weights_only=False)


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a tiny model quantised."""
    from transformers import AutoModelForCausalLM

    def load(dtype, config):
        tiny_model("llama", dtype=dtype, **SIZES).save_pretrained(tmp_path)
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=config).eval()

    return load


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
def test_bitsandbytes(load, bits, dtype):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is not installed")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=dtype)
    model = load(dtype, config)
    assert {p.dtype for p in model.model.layers[0].self_attn.parameters()} <= {torch.uint8, torch.int8}
    assert_open_gates_change_nothing(model, dtype, weights_only=bits == 4)


def test_bitsandbytes_in_storage_of_another_dtype(load):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is not installed")
    from transformers import BitsAndBytesConfig

    # The four-bit numbers lie in a tensor that says float16.
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.float16)
    assert_open_gates_change_nothing(load(torch.bfloat16, config), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(load, kind, dtype):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, which is not installed")
    from transformers import TorchAoConfig

    fields = {}
    if kind == "IntxWeightOnlyConfig":
        fields = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
    model = load(dtype, TorchAoConfig(getattr(quantization, kind)(**fields)))
    assert_open_gates_change_nothing(model, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_hqq(bits, dtype):
    quantize = pytest.importorskip("hqq.core.quantize", reason="needs hqq, which is not installed")
    # transformers 5.23 and 5.24 can't load with an HqqConfig: "QuantizationMethod.HQQ is not available yet".
    model = tiny_model("llama", dtype=dtype, **SIZES)
    for layer in model.model.layers:
        for name in PROJECTIONS:
            config = quantize.BaseQuantizeConfig(nbits=bits, group_size=32)
            linear = getattr(layer.self_attn, name)
            quantised = quantize.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
            setattr(layer.self_attn, name, quantised)
    assert_open_gates_change_nothing(model, dtype)


def test_a_model_without_any_parameter():
    want = with_buffers()
    model = with_buffers()
    for part in model.modules():
        for name, parameter in [*part.named_parameters(recurse=False)]:
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    assert not list(model.parameters())
    assert assert_equivalent(model, policy(MomentGate(threshold=0.1))).logit_error <= 1
    assert fingerprint_of(model).dtype == "float32"
    tokens = list(range(2, 60))
    assert torch.equal(losses(model, tokens), losses(want, tokens))
    assert write(model, tokens, None, 3)[0] == write(want, tokens, None, 3)[0]


def test_models_are_told_apart_by_their_buffers():
    models = [with_buffers(), with_buffers()]
    assert _about_model(models[0]) == _about_model(models[1])
    models[1].model.layers[2].self_attn.o_proj.scales *= 2
    assert _about_model(models[0]) != _about_model(models[1])


def test_models_are_told_apart_by_tensors_of_torchao():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, which is not installed")
    models = [tiny_model("llama", seed=seed, **SIZES) for seed in (0, 0, 1)]
    for model in models:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    first, same, other = map(_about_model, models)
    assert first == same != other


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
def test_a_proof_needs_a_wider_copy():
    model = torch.ao.quantization.quantize_dynamic(tiny_model("llama", **SIZES), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="to judge the stock logits by"):
        assert_equivalent(model, policy(MomentGate(threshold=0.1)))
    assert not patchattn.is_patched(model)
