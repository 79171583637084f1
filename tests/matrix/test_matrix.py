"""Every operation that users of PEFT know, on every row."""

import copy
import pickle

import pytest
import torch
from gptq_models import assert_loaded
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.save_and_load import get_base_model_state_dict
from rows import METHODS, ROWS
from safetensors.torch import load_file

from peft_quant import export_lora, hotswap_adapter
from peft_quant.gptq.zero_points import keep_checkpoint_format


@pytest.fixture(params=ROWS, scope="module")
def row(request):
    return ROWS[request.param]


def same(actual, expected):
    """Equal but for the order of sums, which depends on the size of a batch."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class TestStart:
    def test_every_packed_layer_and_nothing_else_is_adapted(self, row):
        model = row.base()
        packed = {name for name, module in model.named_modules() if hasattr(module, "qweight")}
        adapted = row.layers(get_peft_model(model, row.config()))
        assert {name.removeprefix("base_model.model.") for name in adapted} == packed

    def test_an_untrained_adapter_changes_nothing(self, row):
        tuned = get_peft_model(row.base(), row.config()).eval()
        before = row.logits(tuned)
        with tuned.disable_adapter():
            assert torch.equal(row.logits(tuned), before)

    def test_a_trained_one_does(self, row):
        tuned = row.tuned()
        with tuned.disable_adapter():
            base = row.logits(tuned)
        assert not torch.allclose(row.logits(tuned), base, rtol=1e-3, atol=1e-3)

    def test_configuration_comes_back(self, row, tmp_path):
        config = row.tuned().peft_config["default"]
        config.save_pretrained(tmp_path)
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert type(loaded) is type(config)
        assert loaded.to_dict() == config.to_dict()

    def test_injected_without_a_wrapper(self, row):
        model = inject_adapter_in_model(row.config(changed=True), row.base())
        assert row.layers(model)
        assert row.logits(model).isfinite().all()


class TestTraining:
    def gradients(self, row, model):
        model.train().zero_grad()
        model(**row.batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    @pytest.fixture
    def tuned(self, row):
        # transformers drops nothing out, so that gradients can be compared
        tuned = row.tuned()
        for module in tuned.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return tuned

    def test_all_that_trains_gets_a_gradient_and_nothing_else(self, row, tuned):
        gradients = self.gradients(row, tuned)
        trainable = {name for name, p in tuned.named_parameters() if p.requires_grad}
        if any("experts" in name for name in trainable):  # not every expert gets a token
            assert gradients.keys() <= trainable
            assert gradients
        else:
            assert gradients.keys() == trainable
            assert all(gradient.any() for gradient in gradients.values())

    def test_steps_lower_the_loss(self, row, tuned):
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
        losses = []
        for _ in range(4):
            loss = tuned.train()(**row.batch).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("use_reentrant", (True, False))
    def test_checkpointing_gives_the_same_gradients(self, row, tuned, use_reentrant):
        expected = self.gradients(row, tuned)
        tuned.get_base_model().enable_input_require_grads()
        tuned.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        actual = self.gradients(row, tuned)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)

    def test_autocast_to_bf16(self, row, tuned):
        with torch.autocast("cpu", torch.bfloat16):
            loss = tuned.train()(**row.batch).loss
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.dtype == torch.float32 for p in tuned.parameters() if p.grad is not None)


class TestFiles:
    @pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
    def test_saved_and_loaded(self, row, tmp_path, low_cpu_mem_usage):
        tuned = row.tuned()
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(row.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert_loaded(loaded, tuned, row.logits)

    def test_the_file_holds_the_adapter_alone(self, row, tmp_path):
        tuned = row.tuned()
        tuned.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        trainable = [name for name, p in tuned.named_parameters() if p.requires_grad]
        trainable = [name.replace(".default", "").replace("modules_to_save.", "") for name in trainable]
        assert sorted(saved) == sorted(trainable)

    def test_state_dict_of_the_adapter(self, row):
        tuned, other = row.tuned(), get_peft_model(row.base(), row.config()).eval()
        result = set_peft_model_state_dict(other, get_peft_model_state_dict(tuned))
        assert not result.unexpected_keys
        assert torch.equal(row.logits(other), row.logits(tuned))

    def test_state_dict_of_the_base(self, row):
        base = row.base()
        keep_checkpoint_format(base)  # gptqmodel keeps other zero points in memory than in files
        expected = base.state_dict()
        actual = get_base_model_state_dict(row.tuned())
        assert actual.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())

    def test_deepcopy_and_pickle(self, row):
        tuned = row.tuned()
        expected = row.logits(tuned)
        assert torch.equal(row.logits(copy.deepcopy(tuned)), expected)
        assert pickle.loads(pickle.dumps(tuned.peft_config["default"])) == tuned.peft_config["default"]


class TestSeveral:
    @pytest.fixture
    def pair(self, row):
        tuned = row.tuned()
        tuned.add_adapter("other", row.config(changed=True))
        return tuned

    def test_switching(self, row, pair):
        first = row.logits(pair)
        pair.set_adapter("other")
        assert not torch.allclose(row.logits(pair), first, rtol=1e-3, atol=1e-3)
        pair.set_adapter("default")
        assert torch.equal(row.logits(pair), first)

    def test_both_at_once(self, row, pair, refuses):
        one = row.logits(pair)
        if row.task_type == "SEQ_CLS":  # PEFT trains and uses one head
            with refuses("Only one adapter can be set at a time"):
                pair.base_model.set_adapter(["default", "other"])
            return
        pair.base_model.set_adapter(["default", "other"])
        both = row.logits(pair)
        assert not torch.allclose(both, one, rtol=1e-3, atol=1e-3)
        pair.base_model.set_adapter(["other", "default"])
        same(row.logits(pair), both)

    def test_weighted(self, row, pair, refuses):
        combination = {"PEQA": "linear", "LREC": "cat"}[pair.peft_config["default"].peft_type.value]
        if row.task_type == "SEQ_CLS":  # whose head trains whole
            with refuses("modules_to_save"):
                pair.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination)
            return
        pair.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination)
        pair.base_model.set_adapter(["default", "other"])
        both = row.logits(pair)
        pair.set_adapter("sum")
        torch.testing.assert_close(row.logits(pair), both, rtol=1e-3, atol=1e-3)

    def test_deleted(self, row, pair):
        first = row.logits(pair)
        pair.delete_adapter("other")
        assert list(pair.peft_config) == ["default"]
        assert torch.equal(row.logits(pair), first)

    def test_mixed_batch(self, row, pair, refuses):
        if row.lose_samples:
            with refuses("same as the number of inputs, but got 2 and"):
                row.logits(pair, adapter_names=["default", "other"])
            return
        expected = []
        for sample, name in enumerate(("default", "other")):
            pair.set_adapter(name)
            expected.append(row.logits(pair)[sample])
        same(row.logits(pair, adapter_names=["default", "other"]), torch.stack(expected))

    def test_swapped_in_place(self, row, pair, tmp_path, refuses):
        pair.set_adapter("other")
        expected = row.logits(pair)
        pair.save_pretrained(tmp_path, selected_adapters=["other"])
        pair.set_adapter("default")
        if row.task_type == "SEQ_CLS":
            with refuses("modules_to_save"):
                hotswap_adapter(pair, tmp_path / "other", "default", torch_device="cpu")
            return
        hotswap_adapter(pair, tmp_path / "other", "default", torch_device="cpu")
        same(row.logits(pair), expected)


class TestEnd:
    def test_generation(self, row):
        if row.task_type != "CAUSAL_LM":
            pytest.skip("a classifier does not generate")
        prompt = row.batch["input_ids"][:, :4]
        output = row.tuned().generate(input_ids=prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert output.shape == (2, 7)

    def test_unloading_gives_the_base_back(self, row):
        tuned = row.tuned()
        with tuned.disable_adapter():
            expected = row.logits(tuned)
        unloaded = tuned.unload()
        assert not row.layers(unloaded)
        assert torch.equal(row.logits(get_peft_model(unloaded, row.config()).eval()), expected)

    def test_merging(self, row, refuses):
        tuned = row.tuned()
        expected = row.logits(tuned)
        if row.method is METHODS["LREC"]:
            with refuses("cannot be merged"):
                tuned.merge_and_unload()
            return
        tuned.merge_adapter()
        assert torch.equal(row.logits(tuned), expected)
        tuned.unmerge_adapter()
        assert torch.equal(row.logits(tuned), expected)
        merged = tuned.merge_and_unload()
        assert torch.equal(row.logits(get_peft_model(merged, row.config()).eval()), expected)

    def test_export_to_lora(self, row, tmp_path, refuses):
        tuned = row.tuned()
        if row.method is METHODS["PEQA"]:
            assert not tuned.supports_lora_conversion()
            tuned.save_pretrained(tmp_path / "adapter")
            with refuses("Only LREC adapters are LoRA's"):
                export_lora(tmp_path / "adapter", tmp_path / "lora")
            return
        export_lora(tuned, tmp_path / "lora")
        exported = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        adapter = get_peft_model_state_dict(tuned)
        assert exported.keys() == adapter.keys()
        assert all(torch.equal(tensor, adapter[name]) for name, tensor in exported.items())
        assert PeftConfig.from_pretrained(tmp_path / "lora").peft_type == "LORA"
