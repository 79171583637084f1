"""Saves that are killed before each step that changes what is on disk: what loads is never of two saves."""

import pytest
from gptq_models import needs_native_adapters
from kills import Kills, Material


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.mktemp("material"))


def outcomes(kills):
    """What is left of a save that is killed before its first step, its second and so on."""
    left = []
    while (found := kills.kill(step=len(left) + 1)) is not None:
        left.append(found)
        if len(left) == 3:
            kills.save_again()
    return left


@pytest.mark.parametrize(
    "name",
    (
        "peqa_adapter",
        "lrec_adapter",
        "lrec_as_lora",
        "lrec_in_pickle",
        pytest.param("lrec_in_transformers", marks=needs_native_adapters),
        "qft_trainer",
        "qft_in_shards",
        "qft_shards_over_one_file",
        "card",
        "report",
    ),
)
def test_over_an_older_save(name, material, tmp_path):
    left = outcomes(Kills(getattr(material, name)(), tmp_path / "place"))
    assert left[0] == "old"
    assert "mixed" not in left
    assert left == sorted(left, key=["old", "refused", "new"].index)


@pytest.mark.parametrize("name", ("merge", "qft_to_bf16", "qft_to_gptq", "lrec_to_lora"))
def test_to_a_new_directory(name, material, tmp_path):
    kills = Kills(getattr(material, name)(), tmp_path / "place")
    assert set(outcomes(kills)) == {"old"}  # there is nothing


def test_a_teacher_cache(material, tmp_path):
    left = outcomes(Kills(material.teacher_cache(), tmp_path / "place"))
    assert "new" not in left
    assert "mixed" not in left
