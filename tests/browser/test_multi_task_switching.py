"""The page that switches the task of a running model, in a browser."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from gptq_models import load, tiny_tokenizer
from peft import PeftModel, get_peft_model

from peft_quant import PEQAConfig


EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_task_switching"
TASKS = ("first", "second", "third")
PROMPT, TOKENS = "w1 w2 w3", 12


@pytest.fixture(scope="module")
def task_page():
    sys.path.insert(0, str(EXAMPLE))
    import multi_task_switching

    yield multi_task_switching
    sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def adapters(checkpoint, tmp_path_factory):
    """Random adapters of the tiny model, by task."""
    directories = {task: tmp_path_factory.mktemp("adapters") / task for task in TASKS}
    for seed, directory in enumerate(directories.values()):
        torch.manual_seed(seed)
        get_peft_model(load(checkpoint), PEQAConfig(task_type="CAUSAL_LM", init_weights=False)).save_pretrained(
            directory
        )
    return directories


@pytest.fixture(scope="module")
def expected(checkpoint, adapters):
    """What a model that holds a task's adapter and no other generates."""
    tokenizer = tiny_tokenizer()
    texts = {}
    for task, directory in adapters.items():
        model = PeftModel.from_pretrained(load(checkpoint), directory)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, inputs.input_ids.shape[1] :]
        texts[task] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len(set(texts.values())) == len(TASKS)
    return texts


@pytest.fixture
def task_model(task_page, model, adapters):
    return task_page.TaskModel(PeftModel.from_pretrained(model, adapters["first"]), tiny_tokenizer(), adapters)


@pytest.fixture
def hosts(monkeypatch):
    """The hosts that this process connects to."""
    connected = set()
    connect = socket.socket.connect

    def record(self, address):
        if self.family != socket.AF_UNIX:
            connected.add(address[0])
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", record)
    return connected


@pytest.fixture
def address(task_page, task_model, hosts):
    page = task_page.build_page(task_model, PROMPT, TOKENS)
    yield task_page.launch(page)
    page.close()


def last(answers):
    return [answer.text.strip() for answer in answers][-1]


def test_requests_at_the_same_time_each_get_their_task(task_model, expected):
    wanted = [*TASKS, *reversed(TASKS)] * 2
    with ThreadPoolExecutor(len(wanted)) as pool:
        texts = list(pool.map(lambda task: last(task_model.stream(task, PROMPT, TOKENS)), wanted))
    assert texts == [expected[task] for task in wanted]


def test_an_abandoned_request_ends_its_generation(task_model, expected, monkeypatch):
    generate, lengths = task_model.model.generate, []

    def count(**options):
        lengths.append(generate(**options).shape[1])

    monkeypatch.setattr(task_model.model, "generate", count)
    request = task_model.stream("second", PROMPT, 1000)
    next(request)
    next(request)
    request.close()
    assert last(task_model.stream("third", PROMPT, TOKENS)) == expected["third"]
    assert lengths[0] < 500


def test_an_adapter_that_does_not_fit_is_an_error_and_leaves_the_task(task_model, expected, checkpoint, tmp_path):
    config = PEQAConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(load(checkpoint), config).save_pretrained(tmp_path)
    task_model.adapters = {**task_model.adapters, "other": tmp_path}
    with pytest.raises(ValueError, match="cannot replace adapter"):
        list(task_model.stream("other", PROMPT, TOKENS))
    assert last(task_model.stream("first", PROMPT, TOKENS)) == expected["first"]


def test_the_task_is_switched_in_the_browser(visit, address, expected, hosts):
    opened = visit(address)
    page = opened.page
    for task in (*TASKS, "first"):
        page.get_by_label(task).check()
        page.get_by_role("button", name="Generate").click()
        shown = [page.get_by_label("Output").element_handle(), expected[task]]
        page.wait_for_function("([output, text]) => output.value.trim() === text", arg=shown)
    page.get_by_text("switched in").wait_for()
    # Gradio closes its stream of events once a request is answered
    assert not [error for error in opened.errors if not error.endswith("net::ERR_ABORTED")]
    assert {urlsplit(request).hostname for request in opened.requests} == {"127.0.0.1"}
    assert hosts <= {"127.0.0.1"}
