import math

import pytest
import torch
from gptq_models import PlainLayer, random_packed, save_tiny_llama
from safetensors.torch import load_file, save_file

from peft_quant import gptq
from peft_quant.gptq.fingerprint import checkpoint_digest, fingerprint, layer_digest


def digest(zero_offset=1, spoil=None, **options):
    layer = PlainLayer(random_packed(4, group_size=32, zero_offset=zero_offset, **options))
    if spoil:
        getattr(layer, spoil).view(-1)[0] += 1
    return layer_digest(gptq.packed_tensors(layer), 4, zero_offset)


def test_does_not_depend_on_the_zero_format():
    assert digest(zero_offset=0) == digest(zero_offset=1)


@pytest.mark.parametrize("spoil", gptq.PackedTensors._fields)
def test_depends_on_every_tensor(spoil):
    assert digest() != digest(spoil=spoil)


def test_depends_on_the_weight():
    assert digest() != digest(seed=1)


def test_order_of_layers_does_not_matter():
    first, second = digest(), digest(seed=1)
    assert fingerprint([first, second]) == fingerprint([second, first]) != fingerprint([first])


def test_the_samples_of_older_versions():
    def numbers(*shape):
        return torch.arange(math.prod(shape), dtype=torch.int32).view(shape)

    tensors = gptq.PackedTensors(
        qweight=numbers(12, 64) * 7919,
        qzeros=numbers(3, 8) * 104729,
        scales=(numbers(3, 64) % 7 + 1).half() / 16,
        g_idx=numbers(96) // 32,
    )
    digest = layer_digest(tensors, 4, 1, sampled=True)
    assert fingerprint([digest], sampled=True) == "af5ed084b89357987d760697a832148b"
    assert len(fingerprint([digest])) == 64


def test_depends_on_every_value():
    tensors = gptq.packed_tensors(PlainLayer(random_packed(4, group_size=32)))
    expected = layer_digest(tensors, 4, 1)
    for name, tensor in tensors._asdict().items():
        for position in range(tensor.numel()):
            changed = tensor.clone()
            changed.view(-1)[position] += 1
            assert layer_digest(tensors._replace(**{name: changed}), 4, 1) != expected


class TestCheckpoint:
    def digest(self, directory, zero_offset=1):
        return checkpoint_digest(directory.glob("*.safetensors"), zero_offset)

    def test_does_not_depend_on_shards_zero_format_or_float_dtype(self, tmp_path):
        expected = self.digest(save_tiny_llama(tmp_path / "one"))
        assert self.digest(save_tiny_llama(tmp_path / "shards", shards=3)) == expected
        assert self.digest(save_tiny_llama(tmp_path / "v2", checkpoint_format="gptq_v2"), 0) == expected
        file = tmp_path / "one" / "model.safetensors"
        tensors = load_file(file)
        save_file({name: t.float() if name == "lm_head.weight" else t for name, t in tensors.items()}, file)
        assert self.digest(tmp_path / "one") == expected

    @pytest.mark.parametrize(
        "name",
        (
            "model.embed_tokens.weight",
            "model.norm.weight",
            "lm_head.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.1.mlp.down_proj.qweight",
        ),
    )
    def test_depends_on_every_tensor(self, tmp_path, name):
        directory = save_tiny_llama(tmp_path / "base")
        before = self.digest(directory)
        tensors = load_file(directory / "model.safetensors")
        tensors[name].view(-1)[-1] += 1
        save_file(tensors, directory / "model.safetensors")
        assert self.digest(directory) != before

    def test_depends_on_names(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base")
        before = self.digest(directory)
        tensors = load_file(directory / "model.safetensors")
        one, other = (f"model.layers.{layer}.mlp.up_proj.qweight" for layer in (0, 1))
        tensors[one], tensors[other] = tensors[other], tensors[one]
        save_file(tensors, directory / "model.safetensors")
        assert self.digest(directory) != before
