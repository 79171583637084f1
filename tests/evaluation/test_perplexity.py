import math
from types import SimpleNamespace

import pytest
import torch
from gptq_models import float_llama
from torch import nn

from peft_quant.evaluation.perplexity import perplexity


@pytest.fixture
def windows():
    return torch.randint(3, 128, (7, 12), generator=torch.Generator().manual_seed(0))


def test_is_what_the_models_own_loss_says(windows):
    model = float_llama()
    with torch.no_grad():
        expected = math.exp(model(input_ids=windows, labels=windows).loss)
    for batch_size in (1, 4, 7):
        assert perplexity(model, windows, batch_size=batch_size, description=None) == pytest.approx(expected, rel=1e-5)


def test_leaves_the_mode_as_it_was(windows):
    model = float_llama().train()
    perplexity(model, windows)
    assert model.training


class Constant(nn.Module):
    """Says that the next token is 0, with the same logit everywhere."""

    device = torch.device("cpu")

    def __init__(self, logit):
        super().__init__()
        self.logit = logit

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 128)
        logits[..., 0] = self.logit
        return SimpleNamespace(logits=logits)


def test_of_one_that_knows_nothing(windows):
    assert perplexity(Constant(0.0), windows) == pytest.approx(128)


@pytest.mark.parametrize(("logit", "expected"), ((2000.0, math.inf), (math.nan, math.nan)))
def test_that_is_not_finite(windows, logit, expected):
    assert perplexity(Constant(logit), windows) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("shape", ((0, 4), (3, 1), (4,)))
def test_windows_that_are_none(shape):
    with pytest.raises(ValueError, match="two tokens or more"):
        perplexity(Constant(0.0), torch.zeros(shape, dtype=torch.int64))
