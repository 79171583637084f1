"""Switching adapters while other threads run forwards, which a hook holds in the middle: no test depends on timing."""

import copy
import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Event

import peft.peft_model
import peft.utils.hotswap
import pytest
import torch
from gptq_models import PlainMLP, needs_native_adapters, tiny_config
from peft import get_peft_model
from rows import architecture
from transformers import LlamaForCausalLM

from peft_quant import hotswap_adapter


SECONDS = 60  # that a thread may wait for another one before the test fails
BASE = architecture(LlamaForCausalLM, tiny_config())
GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def threads():
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def config(method):
    return partial(method.config, task_type="CAUSAL_LM", changed=True)


@pytest.fixture
def pair(method, config):
    """A model with two adapters, `default` and `other`."""
    model = method.tuned(copy.deepcopy(BASE), task_type="CAUSAL_LM")
    model.add_adapter("other", config())
    return model.eval()


@pytest.fixture
def bare(config):
    """The same without PEFT's wrapper: adapters of transformers."""
    model = copy.deepcopy(BASE)
    for name in ("other", "default"):
        model.add_adapter(config(), name)
    return model.eval()


@torch.no_grad()
def logits(model, input_ids, **options):
    return model(input_ids=input_ids, use_cache=False, **options).logits


def wait_until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@contextmanager
def held(model, start):
    """A call that a thread of its own has begun and is in the middle of; at the end of the context it goes on."""
    inside, resume = Event(), Event()

    def hold(*_):
        if not inside.is_set():
            inside.set()
            assert resume.wait(SECONDS)

    middle = next(module for name, module in model.named_modules() if name.endswith(("layers.1", "down")))
    handle = middle.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(start)
        try:
            assert inside.wait(SECONDS)
            yield call
        finally:
            resume.set()
    handle.remove()


def during(model, start, switch, threads):
    """Result of a call in whose middle another thread switches; and that of the switch, or its error."""
    with held(model, start) as call:
        switched = threads.submit(switch)
        wait_until(lambda: switched.done() or model._adapter_gate._waiting)
    switched.result(SECONDS)
    return call.result()


def disabled(model):
    with model.disable_adapter():
        pass


def saved(model, name, directory):
    model.save_pretrained(directory, selected_adapters=[name])
    return directory / name


SWITCHES = {
    "set_adapter": lambda model, other: model.set_adapter("other"),
    "disable_adapter": lambda model, other: model.base_model.disable_adapter_layers(),
    "delete_adapter": lambda model, other: model.delete_adapter("default"),
    "load_adapter": lambda model, other: model.load_adapter(other, "default"),
    "hotswap_adapter": lambda model, other: hotswap_adapter(model, other, "default", torch_device="cpu"),
    "unload": lambda model, other: model.unload(),
    "mixed batch": lambda model, other: model(input_ids=torch.tensor([[3]]), adapter_names=["other"]),
}


class TestAForwardKeepsItsAdapter:
    @pytest.mark.parametrize("switch", SWITCHES)
    def test_in_every_switch(self, pair, input_ids, threads, switch, tmp_path):
        other = saved(pair, "other", tmp_path)
        expected = logits(pair, input_ids)
        forward = partial(logits, pair, input_ids)
        assert torch.equal(during(pair, forward, partial(SWITCHES[switch], pair, other), threads), expected)
        if switch not in ("mixed batch", "unload"):
            assert not torch.equal(logits(pair, input_ids), expected)

    @pytest.mark.parametrize("method", ("PEQA",), indirect=True)
    def test_in_merging(self, pair, input_ids, threads):
        pair.set_adapter("other")
        expected = logits(pair, input_ids)
        pair.set_adapter("default")
        pair.merge_adapter(adapter_names=["other"])
        forward = partial(logits, pair, input_ids)
        assert torch.equal(during(pair, forward, pair.unmerge_adapter, threads), expected)

    @pytest.mark.parametrize("method", ("PEQA",), indirect=True)
    def test_disabling_unmerges_so_that_no_forward_does(self, pair):
        pair.merge_adapter()
        pair.base_model.disable_adapter_layers()
        assert pair.get_model_status().merged_adapters == []

    @pytest.mark.parametrize("method", ("LREC",), indirect=True)
    def test_in_hot_swapping_by_peft(self, pair, input_ids, threads, tmp_path):
        other = saved(pair, "other", tmp_path)
        expected = logits(pair, input_ids)
        switch = partial(peft.utils.hotswap.hotswap_adapter, pair, other, "default", torch_device="cpu")
        assert torch.equal(during(pair, partial(logits, pair, input_ids), switch, threads), expected)

    @needs_native_adapters
    @pytest.mark.parametrize(
        "switch", ("set_adapter", "add_adapter", "load_adapter", "delete_adapter", "disable_adapters")
    )
    def test_in_a_model_of_transformers(self, bare, pair, config, input_ids, threads, switch, tmp_path):
        arguments = {
            "set_adapter": ["other"],
            "add_adapter": [config(), "new"],
            "load_adapter": [str(saved(pair, "other", tmp_path)), "new"],
            "delete_adapter": ["default"],
            "disable_adapters": [],
        }
        expected = logits(bare, input_ids)
        change = partial(getattr(bare, switch), *arguments[switch])
        assert torch.equal(during(bare, partial(logits, bare, input_ids), change, threads), expected)
        assert not torch.equal(logits(bare, input_ids), expected)

    def test_in_all_of_generate(self, pair, input_ids, threads):
        def generate():
            return pair.generate(input_ids=input_ids, output_logits=True, return_dict_in_generate=True, **GREEDY)

        expected = torch.stack(generate().logits)
        result = during(pair, generate, partial(pair.set_adapter, "other"), threads)
        assert torch.equal(torch.stack(result.logits), expected)

    def test_with_disabled_adapters(self, pair, input_ids, threads):
        pair.base_model.disable_adapter_layers()
        expected = logits(pair, input_ids)
        forward = partial(logits, pair, input_ids)
        assert torch.equal(during(pair, forward, pair.base_model.enable_adapter_layers, threads), expected)

    def test_in_a_model_that_is_not_of_transformers(self, method, threads):
        model = method.tuned(PlainMLP(), target_modules=["up", "down"]).eval()
        x = torch.ones(1, 64)
        tuned = model(x)
        with model.disable_adapter():
            base = model(x)
        assert torch.equal(during(model, partial(model, x), model.base_model.disable_adapter_layers, threads), tuned)
        assert torch.equal(during(model, partial(model, x), model.base_model.enable_adapter_layers, threads), base)


class TestForwards:
    def test_run_together(self, pair, input_ids, threads):
        expected = logits(pair, input_ids)
        with held(pair, partial(logits, pair, input_ids)):
            assert torch.equal(threads.submit(logits, pair, input_ids).result(SECONDS), expected)

    def test_wait_for_a_switch_that_waits(self, pair, input_ids, threads):
        with held(pair, partial(logits, pair, input_ids)):
            switched = threads.submit(pair.set_adapter, "other")
            wait_until(lambda: pair._adapter_gate._waiting)
            forward = threads.submit(logits, pair, input_ids)
        switched.result(SECONDS)
        assert torch.equal(forward.result(SECONDS), logits(pair, input_ids))

    def test_leave_the_gate_on_an_error(self, pair, input_ids, threads):
        for error in (ValueError, KeyboardInterrupt):

            def fail(*_, error=error):
                raise error

            handle = pair.base_model.model.lm_head.register_forward_pre_hook(fail)
            with pytest.raises(error):
                logits(pair, input_ids)
            handle.remove()
        threads.submit(pair.set_adapter, "other").result(SECONDS)

    def test_may_switch_themselves(self, pair, input_ids):
        pair.set_adapter("other")
        expected = logits(pair, input_ids)
        pair.set_adapter("default")
        pair.get_input_embeddings().register_forward_hook(lambda *_: pair.set_adapter("other"))
        assert torch.equal(logits(pair, input_ids), expected)

    def test_of_two_threads_cannot_both_switch(self, pair, input_ids, threads):
        def switch_within(name, ready):
            with pair._adapter_gate.forward():
                ready()
                pair.set_adapter(name)

        first_inside, second_inside = Event(), Event()
        first = threads.submit(switch_within, "other", lambda: (first_inside.set(), second_inside.wait(SECONDS)))
        assert first_inside.wait(SECONDS)
        gate = pair._adapter_gate
        ready = lambda: (second_inside.set(), wait_until(lambda: gate._waiting))  # noqa: E731
        with pytest.raises(RuntimeError, match="Two threads switch the adapters of one model, each within a forward"):
            switch_within("default", ready)
        first.result(SECONDS)
        assert pair.active_adapters == ["other"]


class TestMixedBatches:
    def test_wait_for_the_weights_of_an_adapter(self, pair, input_ids, threads, tmp_path, monkeypatch):
        other = saved(pair, "other", tmp_path)
        expected = logits(pair, input_ids, adapter_names=["other", "other"])
        inside, resume, read = Event(), Event(), peft.peft_model.load_peft_weights

        def held_read(*args, **kwargs):
            inside.set()
            assert resume.wait(SECONDS)
            return read(*args, **kwargs)

        monkeypatch.setattr("peft.peft_model.load_peft_weights", held_read)
        loaded = threads.submit(pair.load_adapter, other, "new")
        assert inside.wait(SECONDS)
        batch = threads.submit(logits, pair, input_ids, adapter_names=["new", "new"])
        wait_until(lambda: batch.done() or pair._adapter_gate._waiting)
        resume.set()
        loaded.result(SECONDS)
        assert torch.equal(batch.result(SECONDS), expected)

    def test_of_two_threads_at_once(self, pair, input_ids, threads):
        batches = (["default", "other"], ["other", "__base__"])
        expected = [logits(pair, input_ids, adapter_names=names) for names in batches]
        with held(pair, partial(logits, pair, input_ids, adapter_names=batches[0])) as first:
            second = threads.submit(logits, pair, input_ids, adapter_names=batches[1])
            wait_until(lambda: second.done() or pair._adapter_gate._waiting)
        assert torch.equal(first.result(), expected[0])
        assert torch.equal(second.result(SECONDS), expected[1])

    def test_are_of_disabled_adapters_to_their_end(self, pair, input_ids, threads):
        """As `generate` asks whether adapters are enabled before it registers the names."""
        generate = partial(pair.generate, input_ids=input_ids, adapter_names=["default", "other"], **GREEDY)
        pair.base_model.disable_adapter_layers()
        disabled = generate()
        hooks = pair._enable_peft_forward_hooks
        switched = []

        @contextmanager
        def enabled_meanwhile(*args, **kwargs):
            with hooks(*args, **kwargs):
                switched.append(threads.submit(pair.base_model.enable_adapter_layers))
                wait_until(lambda: switched[0].done() or pair._adapter_gate._waiting)
                yield

        pair._enable_peft_forward_hooks = enabled_meanwhile
        assert torch.equal(generate(), disabled)
        switched[0].result(SECONDS)

    def test_leave_other_threads_their_adapter(self, pair, input_ids, threads):
        expected = logits(pair, input_ids)
        generate = partial(pair.generate, input_ids=input_ids, adapter_names=["other", "__base__"], **GREEDY)
        alone = generate()
        with held(pair, generate) as mixed:
            plain = threads.submit(logits, pair, input_ids)
        assert torch.equal(mixed.result(), alone)
        assert torch.equal(plain.result(SECONDS), expected)


class TestBackward:
    @pytest.fixture
    def loss(self, pair, input_ids):
        return lambda: pair.train()(input_ids=input_ids, labels=input_ids).loss

    @pytest.mark.parametrize("use_reentrant", (None, False, True), ids=("stored", "recomputed", "reentrant"))
    def test_is_refused_after_a_switch(self, pair, loss, use_reentrant):
        if use_reentrant is not None:
            pair.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            pair.enable_input_require_grads()
        forward = loss()
        pair.set_adapter("other")
        with pytest.raises(RuntimeError, match="adapters were switched between a forward and the end of its backward"):
            forward.backward()
        assert all(parameter.grad is None for parameter in pair.parameters())
        pair.set_adapter("default")
        loss().backward()

    def test_is_refused_after_hot_swapping(self, pair, loss, tmp_path):
        other = saved(pair, "other", tmp_path)
        forward = loss()
        hotswap_adapter(pair, other, "default", torch_device="cpu")
        with pytest.raises(RuntimeError, match="adapters were switched"):
            forward.backward()

    def test_is_refused_if_another_thread_switches_meanwhile(self, pair, loss, threads):
        layer = pair.base_model.model.model.layers[1].mlp.down_proj
        layer.register_full_backward_hook(lambda *_: threads.submit(disabled, pair).result(SECONDS))
        with pytest.raises(RuntimeError, match="adapters were switched"):
            loss().backward()

    def test_is_as_ever_once_the_adapter_is_back(self, pair, loss, input_ids):
        """As in training against a reference model, which is this model with another adapter or none."""
        loss().backward()
        expected = {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}
        assert expected
        pair.zero_grad()
        forward = loss()
        with pair.disable_adapter():
            logits(pair, input_ids)
        pair.set_adapter("other")
        logits(pair, input_ids)
        pair.set_adapter("default")
        forward.backward()
        assert all(torch.equal(pair.get_parameter(name).grad, grad) for name, grad in expected.items())


class TestTheGate:
    def test_is_not_shared_with_a_copy(self, pair, input_ids, threads):
        for duplicate in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
            assert torch.equal(logits(duplicate, input_ids), logits(pair, input_ids))
            with held(pair, partial(logits, pair, input_ids)):
                threads.submit(duplicate.set_adapter, "other").result(SECONDS)

    def test_goes_with_the_adapters(self, pair):
        assert "_adapter_gate" in vars(pair.get_base_model())
        assert "_adapter_gate" not in vars(pair.unload())

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
    def test_is_open_in_a_fork(self, pair, input_ids):
        with held(pair, partial(logits, pair, input_ids)):
            child = os.fork()
            if not child:
                signal.alarm(SECONDS)
                pair.set_adapter("other")
                os._exit(0 if pair.active_adapters == ["other"] else 1)
            wait_until(lambda: os.waitpid(child, os.WNOHANG) == (child, 0))

    def test_leaves_other_methods_alone(self):
        model = get_peft_model(PlainMLP(), peft.LoraConfig(target_modules=["head"]))
        assert not hasattr(model, "_adapter_gate")
        model.set_adapter("default")
