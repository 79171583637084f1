import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

from peft_quant.ops import reference
from peft_quant.ops.packed.packing import convert_zeros, pack_rows, pack_zeros, unpack_rows, unpack_zeros, words_for


BITS = (2, 3, 4, 8)


def random_codes(bits, rows=64, columns=96, seed=0):
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.parametrize("bits", BITS)
def test_rows_round_trip_and_match_the_bitstream(bits):
    codes = random_codes(bits)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (words_for(64, bits), 96)
    assert torch.equal(unpack_rows(packed, bits).int(), codes)
    assert torch.equal(reference.unpack(packed, bits), codes.long())


@pytest.mark.parametrize("zero_offset", (0, 1))
@pytest.mark.parametrize("bits", BITS)
def test_zeros_round_trip_at_every_value(bits, zero_offset):
    zeros = random_codes(bits, rows=5)
    zeros[0] = 0  # every field borrows in v1
    packed = pack_zeros(zeros, bits, zero_offset)
    assert torch.equal(unpack_zeros(packed, bits, zero_offset).int(), zeros)
    assert torch.equal(reference.zeros(packed, bits, zero_offset), zeros.long())


@pytest.mark.parametrize(
    ("bits", "v1", "v2"), ((2, 0x55555555, -0x55555556), (4, 0x77777777, -0x77777778), (8, 0x7F7F7F7F, -0x7F7F7F80))
)
def test_symmetric_words(bits, v1, v2):
    zeros = torch.full((1, 32), 2 ** (bits - 1))
    assert set(pack_zeros(zeros, bits, 1).flatten().tolist()) == {v1}
    assert set(pack_zeros(zeros, bits, 0).flatten().tolist()) == {v2}


@pytest.mark.parametrize("bits", BITS)
def test_zero_conversion_agrees_with_gptqmodel(bits):
    zeros = random_codes(bits, rows=2, columns=64)
    layer = TorchLinear(bits=bits, group_size=32, sym=False, desc_act=False, in_features=64, out_features=64)
    layer.qzeros = pack_zeros(zeros, bits, 1)
    convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    assert torch.equal(layer.qzeros, pack_zeros(zeros, bits, 0))
    assert torch.equal(layer.qzeros, convert_zeros(pack_zeros(zeros, bits, 1), bits, 1, 0))
    assert torch.equal(pack_zeros(zeros, bits, 1), convert_zeros(layer.qzeros, bits, 0, 1))


def test_v1_zeros_need_the_borrow_across_fields():
    zeros = torch.zeros(1, 32, dtype=torch.int32)
    zeros[0, 1::2] = 5
    packed = pack_zeros(zeros, 4, 1)
    field_by_field = (unpack_zeros(packed, 4, 0).int() + 1) & 15
    assert not torch.equal(field_by_field, zeros)
    assert torch.equal(unpack_zeros(packed, 4, 1).int(), zeros)


@pytest.mark.parametrize(("codes", "bits"), ((48, 3), (6, 4), (32, 5)))
def test_words_for_refuses_what_gptq_cannot_pack(codes, bits):
    with pytest.raises(ValueError, match=str(bits)):
        words_for(codes, bits)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_a_single_word_of_zeros_in_any_layout(bits):
    words = torch.tensor([[0x12345678, 1], [0x0FEDCBA9, 2]], dtype=torch.int32)
    for packed in (words[:1, :1], words[:, :1], words[:, 1:], words.t()[:1, :1]):
        expected = torch.tensor(
            [[word >> i & (1 << bits) - 1 for i in range(0, 32, bits)] for (word,) in packed.tolist()]
        )
        assert torch.equal(unpack_zeros(packed, bits, 0).long(), expected)
