import re

import pytest
from peft.utils.other import get_pattern_key

from peft_quant.patterns import matching_key, require_quick_patterns


PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.gate_proj")
NAMES = [f"model.layers.{block}.{projection}" for block in range(80) for projection in PROJECTIONS]
EXPERTS = [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block in range(48) for expert in range(128)]
OF_A_VISION_MODEL = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj|qkv|proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))"
)


@pytest.mark.parametrize("names", (NAMES, EXPERTS))
@pytest.mark.parametrize(
    "pattern",
    (
        r".*\.(q|v)_proj",
        r"model\.layers\.\d+\..*",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?!.*visual).*(?:q_proj|k_proj).*",
        r".*(?<!cross_)attn\.q_proj",
        r"(?:\w+\.)*q_proj",
        r"([^.]+\.)+(self_attn|mlp)\..*",
        r"(?i:model)\.layers\.([0-9]|1[0-9]|2[0-7])\.self_attn\.(q|k|v|o)_proj",
        r"model.layers.*.*proj",
        "q_proj",
        OF_A_VISION_MODEL,
    ),
)
def test_what_users_write(pattern, names):
    require_quick_patterns({"target_modules": pattern, "exclude_modules": pattern}, names)
    require_quick_patterns({"rank_pattern": {pattern: 8}, "modules_to_save": ["lm_head", "score"]}, names)


def test_one_key_for_each_layer():
    require_quick_patterns({"rank_pattern": {re.escape(name): 8 for name in NAMES}}, NAMES)
    require_quick_patterns({"rank_pattern": {f"^{name}$": 8 for name in NAMES}, "target_modules": NAMES}, NAMES)


@pytest.mark.parametrize(
    "option", ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "alpha_pattern")
)
@pytest.mark.parametrize(
    "pattern",
    (
        r"(([a-z0-9._]+)+)+!",
        r"([a-z0-9._]|.)*!",
        r"q_proj|(\w|.)+!",
        r".*.*.*.*.*.*!",
        r"(.*?)*!",
        r"(.?){60}!",
        r"((?:)?.)*!",
        r"(.{1,9}){1,9}(.{1,9}){1,9}!",
        "|".join(["(.|.)" * 20] * 3),
        r"(?=(([a-z0-9._]+)+)+!)x",
        r"(?i:(([A-Z0-9._]+)+)+!)",
        r".{24}(?<=(?:.|.){24}).?!|.{24}(?<!(?:.|.){23}!)x",
        r"(){1000000000}",
        r"model\.layers\.77\.(([a-z._]+)+)+!",  # with few of the names
    ),
)
def test_what_would_not_end(option, pattern):
    options = {option: {pattern: 8} if option == "alpha_pattern" else pattern}
    with pytest.raises(ValueError, match=f"{option} has the regular expression .* too long to match with model"):
        require_quick_patterns(options, NAMES)


@pytest.mark.parametrize(
    "pattern",
    (
        "(",
        "[a-",
        "a{99999999999}",
        "(?<=a*)b",
        "(" * 10**4,
        "(?:" * 10**4 + ")*" * 10**4,
        r"(a)\1",
        "(a)?(?(1)b|c)",
        "*",
    ),
)
def test_what_is_no_regular_expression(pattern):
    with pytest.raises(ValueError, match=r"target_modules has .* which cannot be used as a regular expression"):
        require_quick_patterns({"target_modules": pattern}, NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (
            {"target_modules": [f"a{n}" for n in range(10**5)]},
            "target_modules has 100000 entries, more than",
        ),
        ({"rank_pattern": {f"a{n}": 1 for n in range(10**5)}}, "rank_pattern has 100000 entries, more than"),
        ({"target_modules": "a?" * 10**5}, "regular expressions of more than 50000 characters"),
        ({"modules_to_save": [f"a{n}?" for n in range(320)] * 40}, "modules_to_save has 12800 entries"),
    ),
)
def test_too_many(options, message):
    with pytest.raises(ValueError, match=message):
        require_quick_patterns(options, NAMES)


def test_too_many_pairs():
    with pytest.raises(ValueError, match="alpha_pattern has 1000 entries for 6144 modules"):
        require_quick_patterns({"alpha_pattern": {f"a{n}": 1 for n in range(1000)}}, EXPERTS)


def test_hostile_names():
    names = ["e" * 10**4, "." * 10**4]
    require_quick_patterns({"alpha_pattern": {"q_proj": 8}}, names)
    with pytest.raises(ValueError, match="too long to match"):
        require_quick_patterns({"alpha_pattern": {".*e.*e.*!": 8}}, names)


@pytest.mark.parametrize("name", (NAMES[0], "q_proj", "other"))
@pytest.mark.parametrize(
    "patterns", ({}, {"q_proj": 1}, {"_proj": 1}, {r"layers\.0\..*": 1, "q_proj": 2}, {"v_proj|q_proj": 1}, {"o.*": 1})
)
def test_keys_match_as_in_peft(patterns, name):
    expected = get_pattern_key(patterns, name)
    assert matching_key(patterns, name) == (expected if expected in patterns else None)
