"""Adapters are switched between forwards, never during one, also if other threads run them."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import Condition, get_ident
from typing import Any

import peft.utils.hotswap
import torch
from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves
from transformers import GenerationMixin, PreTrainedModel

from ..registry import wrap_method
from .layer import AdaptedLinear


_GATE = "_adapter_gate"


class AdapterGate:
    """Lets forwards of a model run together, and switches of its adapters alone.

    A switch waits for the forwards of other threads, and new ones wait for it. Within a thread, forwards and switches
    nest in any order. Copies of a model get a gate of their own, as do forks of the process.
    """

    def __init__(self) -> None:
        self._open()
        _gates.add(self)

    def _open(self) -> None:
        self._changed = Condition()
        self._forwards: Counter[int] = Counter()  # by thread
        self._waiting: Counter[int] = Counter()  # threads that are about to switch
        self._switching: int | None = None
        self.switches = 0
        self.hotswaps = 0

    def __reduce__(self) -> tuple[type[AdapterGate], tuple[()]]:
        return AdapterGate, ()

    @contextmanager
    def forward(self) -> Iterator[bool]:
        """Context of a forward. Its value is whether it is the outermost one of this thread."""
        thread = get_ident()
        with self._changed:
            outermost = thread not in self._forwards
            if outermost and self._switching != thread:
                self._changed.wait_for(lambda: self._switching is None and not self._waiting)
            self._forwards[thread] += 1
        try:
            yield outermost
        finally:
            with self._changed:
                _decrement(self._forwards, thread)
                self._changed.notify_all()

    @contextmanager
    def switch(self) -> Iterator[None]:
        """Context of a switch.

        Raises:
            RuntimeError: this thread and another one both want to switch within a forward, each waiting for the other.
        """
        thread = get_ident()
        if self._switching == thread:
            yield
            return
        with self._changed:
            if thread in self._forwards and self._waiting.keys() & self._forwards.keys():
                raise RuntimeError(
                    "Two threads switch the adapters of one model, each within a forward that the other one has to "
                    "wait for. Switch before or after the forward."
                )
            self._waiting[thread] += 1
            try:
                self._changed.wait_for(lambda: self._switching is None and self._forwards.keys() <= {thread})
            finally:
                _decrement(self._waiting, thread)
                self._changed.notify_all()
            self._switching = thread
            self.switches += 1
        try:
            yield
        finally:
            with self._changed:
                self._switching = None
                self._changed.notify_all()


def _decrement(counter: Counter[int], key: int) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


_gates: weakref.WeakSet[AdapterGate] = weakref.WeakSet()


def _open_gates() -> None:
    for gate in list(_gates):
        gate._open()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_gates)  # the threads inside are not in the child


def add_gate(model: nn.Module) -> None:
    """Give a model a gate if it has none."""
    vars(model).setdefault(_GATE, AdapterGate())


def remove_gate(model: nn.Module) -> None:
    """Take away the gate of a model that has no adapters any more."""
    vars(model).pop(_GATE, None)


def switching(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which a model's adapters may change: no other thread runs a forward of it, or changes them as well.

    Args:
        model: the model, or PEFT's wrapper of it. Without adapters of this package, nothing is waited for.
    """
    gate = getattr(model, _GATE, None)
    return nullcontext() if gate is None else gate.switch()


@contextmanager
def hotswapping(model: nn.Module) -> Iterator[None]:
    """Context in which an adapter's values may change: [`switching`], which no backward goes past."""
    with switching(model):
        gate = getattr(model, _GATE, None)
        if gate is not None:
            gate.hotswaps += 1
        yield


def switch(stock: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Wrapper of a method that switches a model's adapters; see [`wrap_method`]."""
    with switching(model):
        return stock(model, *args, **kwargs)


def _hotswap(stock: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with hotswapping(model):
        return stock(model, *args, **kwargs)


def _forward(stock: Callable[..., Any], model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    gate: AdapterGate | None = None if torch.compiler.is_compiling() else getattr(model, _GATE, None)
    if gate is None:
        return stock(model, *args, **kwargs)
    # hooks pass a mixed batch its names, which other threads' forwards would run as well
    alone = nullcontext() if kwargs.get("adapter_names") is None else gate.switch()
    with alone, gate.forward() as outermost:
        output = stock(model, *args, **kwargs)
        if outermost:
            _check_backward(gate, model, output)
        return output


def _check_backward(gate: AdapterGate, model: nn.Module, output: Any) -> None:
    """Let backward through a forward's output raise if adapters were switched in between, or are meanwhile.

    PEFT turns off the gradients of adapters that are not active, and gradient checkpointing runs blocks again.
    """
    nodes = [tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor) and tensor.grad_fn]
    if not nodes:
        return
    before = gate.hotswaps, _selection(model)

    def check(*_: Any) -> None:
        if (gate.hotswaps, _selection(model)) != before:
            raise RuntimeError(_SWITCHED)
        Variable._execution_engine.queue_callback(partial(check_end, gate.switches))

    def check_end(switches: int) -> None:
        if gate.switches != switches:
            raise RuntimeError(_SWITCHED)

    for node in nodes:
        node.register_prehook(check)


_SWITCHED = (
    "The model's adapters were switched between a forward and the end of its backward, so the gradients would not be "
    "those of the adapters in the forward. Switch after backward, and in no other thread while one trains."
)


def _selection(model: nn.Module) -> Any:
    """Which adapters a forward uses."""
    layer = next((module for module in model.modules() if isinstance(module, AdaptedLinear)), None)
    return layer and (list(layer.active_adapters), layer.disable_adapters, layer.merged_adapters.copy())


for _owner in (PeftModel, BaseTuner, PreTrainedModel):
    wrap_method(_owner, "__call__", _forward)
for _owner in (PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM, GenerationMixin):
    wrap_method(_owner, "generate", _forward)
for _name in ("add_adapter", "load_adapter"):
    wrap_method(PeftModel, _name, switch)
for _name in ("add_adapter", "delete_adapter", "disable_adapters", "enable_adapters", "load_adapter", "set_adapter"):
    wrap_method(PreTrainedModel, _name, switch)
wrap_method(peft.utils.hotswap, "hotswap_adapter_from_state_dict", _hotswap)
