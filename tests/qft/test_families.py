"""Models of many families in int8: their checkpoints load, under every head, and so do their exports."""

import json

import pytest
import torch
import transformers
from gptq_models import load
from qft_models import FAMILIES, assert_equal, contents, family_trainer, int8_model
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, CLIPConfig, CLIPModel, LlamaForCausalLM, LlamaModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from peft_quant import Int8Weight, InvalidCheckpointError, QFTConfig, convert_to_int8, export_qft
from peft_quant.qft.checkpoint import PARTS


families = pytest.mark.parametrize("family", FAMILIES)
CONFIGS = (QFTConfig(), QFTConfig(embeddings=True))
HEADS = [(name, head) for name, family in FAMILIES.items() for head in family.heads]


def load_clean(model_class, directory, **options):
    model, info = model_class.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def names_in(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def int8_names(model):
    return {name for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, Int8Weight)}


def as_weights(names):
    """Names of parts as that of the weight."""
    return {f"{name.rpartition('.')[0]}.weight" if name.rpartition(".")[2] in PARTS else name for name in names}


@families
class TestCheckpoints:
    @pytest.mark.parametrize("config", CONFIGS, ids=vars)
    def test_bit_equal(self, tmp_path, family, config):
        model = int8_model(family, config)
        assert int8_names(model)
        model.save_pretrained(tmp_path / "saved")
        loaded = load_clean(type(model), tmp_path / "saved")
        assert_equal(loaded, model)
        assert int8_names(loaded) == int8_names(model)
        loaded.save_pretrained(tmp_path / "again")
        assert_equal(load_clean(type(model), tmp_path / "again"), model)

    def test_the_names_are_those_of_a_float_checkpoint(self, tmp_path, family):
        FAMILIES[family].model().save_pretrained(tmp_path / "float")
        int8_model(family).save_pretrained(tmp_path / "int8")
        expected, found = names_in(tmp_path / "float"), as_weights(names_in(tmp_path / "int8"))
        if family == "NomicBERT classifier":  # a weight in int8 is not made one with others
            assert expected - found == {f"nomic_bert.encoder.layers.{layer}.attn.Wqkv.weight" for layer in (0, 1)}
        else:
            assert found == expected

    @pytest.mark.parametrize("config", CONFIGS, ids=vars)
    def test_a_float_checkpoint_is_quantized_on_the_way(self, tmp_path, family, config):
        model = FAMILIES[family].model()
        model.save_pretrained(tmp_path / "float")
        loaded = load_clean(type(model), tmp_path / "float", quantization_config=config)
        assert_equal(loaded, convert_to_int8(model, config))
        loaded.save_pretrained(tmp_path / "int8")
        assert_equal(load_clean(type(model), tmp_path / "int8"), loaded)

    def test_in_another_dtype(self, tmp_path, family):
        model = int8_model(family)
        model.save_pretrained(tmp_path)
        loaded = load_clean(type(model), tmp_path, dtype=torch.float32)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}

    def test_trained_and_resumed(self, tmp_path, family):
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        run = family_trainer(tmp_path / "run", family, int8_model(family), **settings)
        run.train()
        run.save_model(tmp_path / "saved")
        assert_equal(load_clean(type(run.model), tmp_path / "saved"), run.model)
        resumed = family_trainer(tmp_path / "on", family, int8_model(family, seed=1), **settings)
        resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-1")
        assert_equal(resumed.model, run.model)


@pytest.mark.parametrize(("family", "head"), HEADS)
class TestHeads:
    @pytest.mark.parametrize("config", CONFIGS, ids=vars)
    @pytest.mark.parametrize("back", (False, True))
    def test_as_in_float(self, tmp_path, family, head, config, back):
        classes = [getattr(transformers, name) for name in (FAMILIES[family].model_class, head)]
        saved_class, loaded_class = reversed(classes) if back else classes
        torch.manual_seed(0)
        model = saved_class(FAMILIES[family].config())
        model.save_pretrained(tmp_path / "float")
        convert_to_int8(model, config).save_pretrained(tmp_path / "int8")
        in_float, expected = loaded_class.from_pretrained(tmp_path / "float", output_loading_info=True)
        loaded, found = loaded_class.from_pretrained(tmp_path / "int8", output_loading_info=True)
        assert found == expected
        convert_to_int8(in_float, config)  # so what is new, as a pooler, is quantized too
        assert int8_names(loaded) == int8_names(in_float)
        own, other = contents(loaded), contents(in_float)
        assert all(
            torch.equal(own[name], other[name]) for name in own if name.split()[0] not in expected["missing_keys"]
        )
        loaded.save_pretrained(tmp_path / "again")
        assert_equal(load_clean(loaded_class, tmp_path / "again"), loaded)


class TestNames:
    def test_a_new_head_is_trained_and_loaded(self, tmp_path):
        FAMILIES["BERT"].model().save_pretrained(tmp_path / "float")
        options = {"quantization_config": QFTConfig(), "num_labels": 3}
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float", **options)
        assert isinstance(model.bert.pooler.dense.weight, Int8Weight)
        run = family_trainer(tmp_path / "run", "BERT classifier", model, max_steps=1)
        run.train()
        run.save_model(tmp_path / "saved")
        assert_equal(load_clean(type(model), tmp_path / "saved"), model)

    @pytest.mark.parametrize(
        "family", ("BERT classifier", "RoBERTa classifier", "BART classifier", "Llama classifier")
    )
    def test_a_head_of_its_own_stays_in_float(self, family):
        model = int8_model(family)
        base = {id(p) for p in model.base_model.parameters()}
        assert not {name for name in int8_names(model) if id(model.get_parameter(name)) not in base}

    def test_names_in_the_config_are_those_of_any_class(self, tmp_path):
        model = int8_model("Llama", QFTConfig(modules_to_not_convert=["model.layers.0"]))
        model.save_pretrained(tmp_path / "saved")
        base = LlamaModel.from_pretrained(tmp_path / "saved")
        assert {name.removeprefix("model.") for name in int8_names(model)} == int8_names(base)
        assert not any(name.startswith("layers.0") for name in int8_names(base))
        base.save_pretrained(tmp_path / "base")
        assert int8_names(LlamaForCausalLM.from_pretrained(tmp_path / "base")) == int8_names(model)

    def test_some_of_the_weights_that_a_file_holds_as_one(self, tmp_path):
        config = QFTConfig(modules_to_not_convert=["q_proj"])
        model = int8_model("NomicBERT classifier", config)
        model.save_pretrained(tmp_path)
        assert_equal(load_clean(type(model), tmp_path), model)

    def test_a_mapping_of_ones_own_is_not_needed_again(self, tmp_path):
        model = FAMILIES["Llama"].model()
        model._weight_conversions = [WeightRenaming(r"^odd\.", "model.")]
        model.save_pretrained(tmp_path / "float")
        assert "odd.norm.weight" in names_in(tmp_path / "float")
        options = {"key_mapping": {r"^odd\.": "model."}, "quantization_config": QFTConfig()}
        loaded = load_clean(LlamaForCausalLM, tmp_path / "float", **options)
        loaded.save_pretrained(tmp_path / "int8")
        assert_equal(load_clean(LlamaForCausalLM, tmp_path / "int8"), loaded)

    def test_a_mapping_from_which_int8_does_not_come_back_is_refused(self, tmp_path):
        class RenamedLlama(LlamaForCausalLM):
            pass

        # the name of a weight without its `weight`, which the parts in int8 do not have
        renaming = WeightRenaming(r"(self_attn)\.o_proj", r"\1.o_proj.weight")
        register_checkpoint_conversion_mapping("RenamedLlama", [renaming], overwrite=True)
        config = FAMILIES["Llama"].config()
        with pytest.raises(ValueError, match=r"renames 2 weights of a RenamedLlama, first .*o_proj\.weight"):
            convert_to_int8(RenamedLlama(config)).save_pretrained(tmp_path / "first")
        model = convert_to_int8(RenamedLlama(config), QFTConfig(modules_to_not_convert=["o_proj"]))
        model.save_pretrained(tmp_path / "second")
        assert_equal(load_clean(RenamedLlama, tmp_path / "second"), model)

    def test_damage_is_called_by_its_name_in_the_model(self, tmp_path):
        model = int8_model("Qwen2.5-VL")
        model.model.language_model.layers[0].mlp.up_proj.weight.scales.fill_(torch.nan)
        model.save_pretrained(tmp_path)
        with pytest.raises(
            InvalidCheckpointError, match=r"model\.language_model\.layers\.0\.mlp\.up_proj is not a val"
        ):
            type(model).from_pretrained(tmp_path)

    def test_damage_of_a_head_that_is_not_loaded_is_not_looked_at(self, tmp_path):
        model = int8_model("T5")
        model.decoder.block[0].layer[2].DenseReluDense.wo.weight.scales.fill_(torch.nan)
        model.save_pretrained(tmp_path)
        transformers.T5EncoderModel.from_pretrained(tmp_path)
        with pytest.raises(InvalidCheckpointError, match="scales are finite and not zero"):
            transformers.T5Model.from_pretrained(tmp_path)

    def test_a_model_without_embeddings_of_tokens(self, tmp_path):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {**sizes, "image_size": 16, "patch_size": 8}
        model = convert_to_int8(CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=16)))
        with pytest.raises(NotImplementedError):
            model.get_input_embeddings()
        model.save_pretrained(tmp_path)
        assert_equal(load_clean(CLIPModel, tmp_path), model)

    def test_weights_that_were_replaced_are_refused(self, tmp_path):
        model = int8_model("Llama")
        layer = model.model.layers[1].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.dequantize())
        message = r"1 weights, first model\.layers\.1\.mlp\.up_proj\.weight, are in float and in int8 by the model's"
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path)
        model = int8_model("Llama")
        model.lm_head.weight = torch.nn.Parameter(Int8Weight.from_dense(model.lm_head.weight))
        with pytest.raises(ValueError, match=r"first lm_head\.weight, are in int8 and in float by the model's"):
            model.save_pretrained(tmp_path)


@families
class TestExports:
    def test_bf16(self, tmp_path, family):
        model = int8_model(family, dtype=torch.float32)
        error = export_qft(model, tmp_path / "out", inputs=FAMILIES[family].inputs())
        loaded = load_clean(type(model), tmp_path / "out", dtype=torch.float32)
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        expected, found = (FAMILIES[family].logits(each) for each in (model, loaded))
        # both in fp32, where int8 weights are decoded in another order of operations
        assert (found - expected).abs().max().item() == pytest.approx(error.largest, rel=1e-3)
        assert 0 < error.largest < 0.05 * error.largest_logit
        dense = {name: p.dequantize() if isinstance(p, Int8Weight) else p for name, p in model.named_parameters()}
        assert all(torch.equal(loaded.get_parameter(name), p.bfloat16().float()) for name, p in dense.items())

    def test_gptq(self, tmp_path, family):
        model = int8_model(family, QFTConfig(outlier_ratio=0.0), torch.float32)
        inputs = FAMILIES[family].inputs()
        if not FAMILIES[family].gptq:
            with pytest.raises(ValueError, match=r"transformers c.* load .*GPTQ.*: export it as bf16"):
                export_qft(model, tmp_path / "out", "gptq", inputs=inputs)
            assert not (tmp_path / "out").exists()
            return
        error = export_qft(model, tmp_path / "out", "gptq", inputs=inputs)
        assert error.largest == 0
        loaded = load(tmp_path / "out", bits=8, model_class=type(model))
        expected, found = (FAMILIES[family].logits(each) for each in (model, loaded))
        # the engine rounds decoded weights to 16 bits
        assert (found - expected).abs().max() <= 5e-3 * error.largest_logit
        packed = {name.rpartition(".")[0] for name in loaded.state_dict() if name.endswith(".qweight")}
        text = {name.removesuffix(".weight") for name in int8_names(model) if "vis" not in name}
        assert packed == {name for name in text if any(part.isdigit() for part in name.split("."))}
