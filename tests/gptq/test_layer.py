"""One view over the layers of gptqmodel, of auto-gptq and plain ones; every trap of the kernels."""

import importlib.util
from importlib.metadata import version

import pytest
import torch
from accelerate import cpu_offload
from auto_gptq_layers import auto_gptq_linear
from gptq_models import PlainLayer, load, random_packed, save_tiny_llama
from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear
from gptqmodel.nn_modules.qlinear.machete import MacheteLinear
from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear
from gptqmodel.nn_modules.qlinear.torch_fused import TorchFusedLinear
from gptqmodel.nn_modules.qlinear.torch_int8 import TorchInt8Linear
from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear
from packaging.version import Version
from torch import nn

from peft_quant import gptq


needs_auto_gptq = pytest.mark.skipif(
    importlib.util.find_spec("auto_gptq") is None, reason="auto-gptq 0.7.1 has wheels up to Python 3.11"
)

FORMATS = [
    (bits, group_size, symmetric, act_order)
    for bits in (2, 3, 4, 8)
    for group_size in (-1, 32, 64)
    for symmetric in (True, False)
    for act_order in (False, True)
]


def gptqmodel_layer(kind, packed, **tensors):
    rows, columns = packed.weight.shape
    layer = kind(
        bits=packed.bits,
        group_size=packed.group_size if packed.group_size in (16, 32, 64, 128) else -1,
        sym=True,
        desc_act=False,
        in_features=rows,
        out_features=columns,
        bias=False,
        register_buffers=True,
    )
    for name, tensor in {**packed.tensors, **tensors}.items():
        setattr(layer, name, tensor.clone())
    return layer


@pytest.mark.parametrize("zero_offset", (0, 1))
@pytest.mark.parametrize(("bits", "group_size", "symmetric", "act_order"), FORMATS)
def test_plain_layers_of_every_format(bits, group_size, symmetric, act_order, zero_offset):
    packed = random_packed(
        bits, group_size=group_size, symmetric=symmetric, act_order=act_order, zero_offset=zero_offset
    )
    layer = PlainLayer(packed)
    read = gptq.read_format(layer)
    assert (read.bits, read.in_features, read.out_features) == (bits, 96, 64)
    assert read.group_size == packed.group_size
    assert read.groups == packed.tensors["scales"].shape[0]
    assert read.zero_offset == zero_offset
    assert read.act_order == (act_order and group_size != -1)
    assert read.symmetric == bool((packed.zeros == 2 ** (bits - 1)).all())
    assert torch.equal(gptq.dequantize(layer, read), packed.weight.t())


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("act_order", (False, True))
def test_gptqmodel_computes_the_same_weight(bits, act_order):
    packed = random_packed(bits, group_size=32, symmetric=False, act_order=act_order, zero_offset=0)
    layer = gptqmodel_layer(TorchLinear, packed)
    layer.optimized = True
    layer.post_init()
    ours = gptq.dequantize(layer, gptq.read_format(layer)).t()
    assert torch.equal(ours, packed.weight)
    # gptqmodel multiplies in fp16: half a unit in the last place of the largest weight
    theirs = layer.dequantize_weight().float()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=ours.abs().max().item() * 2**-11)


@pytest.mark.parametrize("kind", (TorchLinear, TritonV2Linear, TorchAtenLinear, TorchFusedLinear))
def test_trainable_kernels_of_gptqmodel(kind):
    packed = random_packed(4, rows=128, columns=128, group_size=32, zero_offset=0)
    layer = gptqmodel_layer(kind, packed)
    assert torch.equal(gptq.dequantize(layer, gptq.read_format(layer)).t(), packed.weight)


def test_zero_format_is_the_kernels_not_what_qzero_format_says():
    layer = gptqmodel_layer(TorchLinear, random_packed(4, group_size=32, zero_offset=0))
    assert layer.qzero_format() == 1  # as for a layer loaded from a v2 checkpoint, which holds v2 zero points
    assert gptq.read_format(layer).zero_offset == 0


def test_swapped_flags_of_loaded_layers_are_not_believed(tmp_path):
    model = load(save_tiny_llama(tmp_path / "llama", symmetric=True, act_order=False))
    layer = model.model.layers[0].mlp.down_proj
    assert (layer.sym, layer.desc_act) == (False, True)
    read = gptq.read_format(layer)
    assert (read.symmetric, read.act_order) == (True, False)


@needs_auto_gptq
@pytest.mark.parametrize("kind", ("cuda", "cuda_old", "triton"))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_layers_packed_by_auto_gptq(kind, bits):
    if kind == "triton" and bits == 3:
        with pytest.raises(NotImplementedError):
            auto_gptq_linear(kind)(3, 32, 96, 64, True)
        return
    packed = random_packed(bits, group_size=32, symmetric=False)
    packed.zeros.clamp_(min=1)  # auto-gptq's own packer damages the neighbours of a zero point of 0
    dense = nn.Linear(96, 64)
    dense.weight.data = packed.weight.t().contiguous()
    layer = auto_gptq_linear(kind)(bits, 32, 96, 64, True, weight_dtype=torch.float32)
    g_idx = packed.tensors["g_idx"]
    layer.pack(dense, packed.tensors["scales"].t().float(), packed.zeros.t().float(), g_idx)
    read = gptq.read_format(layer)
    assert (read.bits, read.zero_offset, read.group_size) == (bits, 1, 32)
    assert torch.equal(layer.scales.float(), packed.tensors["scales"].float())
    assert torch.equal(gptq.dequantize(layer, read).t(), packed.weight)
    x = torch.randn(3, 96)
    if kind != "triton":  # needs a GPU
        torch.testing.assert_close(gptq.linear(layer, read, x), layer(x), rtol=1e-4, atol=1e-4)


@needs_auto_gptq
@pytest.mark.parametrize("kind", ("exllama", "exllamav2"))
def test_repacking_layers_of_auto_gptq_are_refused(kind):
    layer = auto_gptq_linear(kind)(4, 32, 96, 64, False)
    with pytest.raises(gptq.RepackedLayerError, match=r'up_proj \(QuantLinear\).*exllama.*backend="gptq_torch"'):
        gptq.read_format(layer, "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("kind", (MarlinLinear, ExllamaV2Linear, MacheteLinear, TorchInt8Linear))
def test_repacking_kernels_of_gptqmodel_are_refused(kind):
    layer = kind.__new__(kind)  # constructing most of them needs a GPU and a compiler
    nn.Module.__init__(layer)
    assert gptq.is_packed(layer)
    with pytest.raises(gptq.RepackedLayerError, match=rf'q_proj \({kind.__name__}\).*backend="gptq_torch"'):
        gptq.read_format(layer, "q_proj")


@pytest.mark.skipif(Version(version("gptqmodel")) >= Version("7.7"), reason="7.7 has other kernels for CPUs")
@pytest.mark.parametrize("backend", ("auto", "auto_trainable"))
def test_cpu_kernels_are_accepted_before_their_first_evaluation_and_refused_after(checkpoint, input_ids, backend):
    model = load(checkpoint, backend=backend)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, (TorchAtenLinear, TorchFusedLinear))
    gptq.read_format(layer)
    with torch.no_grad():
        model(input_ids)
    with pytest.raises(gptq.RepackedLayerError, match=r'repacked.*backend="gptq_torch"'):
        gptq.read_format(layer, "q_proj")


def test_offloaded_layers_are_refused(checkpoint):
    model = load(checkpoint)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(ValueError, match=r"q_proj \(TorchLinear\) is offloaded by accelerate"):
        gptq.read_format(model.model.layers[0].self_attn.q_proj, "q_proj")


def test_planar_layers_are_refused():
    layer = PlainLayer(random_packed(3))
    layer.planar = True
    with pytest.raises(gptq.RepackedLayerError, match="gptq_p"):
        gptq.read_format(layer)


def test_zero_format_is_never_guessed():
    layer = PlainLayer(random_packed(4))
    del layer.checkpoint_format
    with pytest.raises(gptq.InvalidCheckpointError, match="Set `checkpoint_format`"):
        gptq.read_format(layer)


def test_attributes_that_contradict_the_tensors_are_refused():
    layer = PlainLayer(random_packed(4))
    layer.bits = 8
    with pytest.raises(gptq.InvalidCheckpointError, match=r"bits=8.*hold 4"):
        gptq.read_format(layer)


def test_other_modules_are_not_packed():
    assert not gptq.is_packed(nn.Linear(4, 4))
    assert not gptq.is_packed(nn.Identity())


def test_bias_and_autocast():
    packed = random_packed(4, group_size=32)
    bias = torch.randn(64).half()
    layer = PlainLayer(packed, bias)
    read = gptq.read_format(layer)
    x = torch.randn(5, 96)
    torch.testing.assert_close(gptq.linear(layer, read, x), x @ packed.weight + bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert gptq.linear(layer, read, x).dtype == torch.bfloat16
