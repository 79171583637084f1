"""Pushes by the real client to a hub on loopback, and what another process gets from there."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
from gptq_models import load
from hub_client import client
from hub_server import Hub, serve
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import PeftModel, get_peft_model
from qft_models import assert_equal, int8_llama, trainer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_quant import LRECConfig, PEQAConfig, export_qft, hotswap_adapter, merge_checkpoint


HTTPError = HfHubHTTPError.__bases__[0]  # of the httpx that the client uses
STORAGES = ("regular", "lfs", "xet")
CONFIGS = {
    "peqa": PEQAConfig(task_type="CAUSAL_LM", init_weights=False),
    "lrec": LRECConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False),
}

PULL = """
import json
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig

(merged, adapters), input_file, output_file = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
input_ids = load_file(input_file)["input_ids"]
options = {"quantization_config": GPTQConfig(bits=4, backend="gptq_torch"), "dtype": torch.float32}
logits = {}

@torch.no_grad()
def run(name, model):
    logits[name] = model(input_ids).logits

for name in merged:
    run(name, AutoModelForCausalLM.from_pretrained(name, **options))
assert "peft_quant" not in sys.modules

import peft_quant
from peft import AutoPeftModelForCausalLM

for name in adapters:
    repository, _, revision = name.partition("@")
    run(name, AutoPeftModelForCausalLM.from_pretrained(repository, revision=revision or None, **options))
save_file(logits, output_file)
"""


def tuned(checkpoint, method="peqa", seed=0):
    """An adapter on the checkpoint, as if that had been loaded by its id."""
    base = load(checkpoint)
    base.name_or_path = base.config._name_or_path = "user/base"
    torch.manual_seed(seed)
    return get_peft_model(base, CONFIGS[method]).eval()


@torch.no_grad()
def logits(model, input_ids):
    return model.eval()(input_ids=input_ids).logits


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def sent(hub):
    """How often each object was uploaded."""
    return Counter(line.split()[1] for line in hub.requests if line.startswith("PUT") and line.endswith(" 200"))


@pytest.fixture
def hub(checkpoint, tmp_path):
    hub = Hub(tmp_path / "hub")
    hub.add("user/base", checkpoint)
    return hub


@pytest.fixture(scope="module")
def round_trip(checkpoint, input_ids, tmp_path_factory):
    """Logits of what was pushed from here, and of what a fresh process got, by id or id@branch; and the hub."""
    directory = tmp_path_factory.mktemp("round_trip")
    hub, pushed = Hub(directory / "hub"), {}
    hub.add("user/base", checkpoint)
    for seed, storage in enumerate(STORAGES):  # no content is stored in two ways
        with client(hub, directory / "home", storage) as endpoint:
            for method in CONFIGS:
                model = tuned(checkpoint, method, seed)
                model.push_to_hub(f"user/{method}-{storage}", private=method == "lrec")
                pushed[f"user/{method}-{storage}"] = logits(model, input_ids)
                if method == "peqa":
                    files, merged = directory / f"adapter-{storage}", directory / f"merged-{storage}"
                    model.save_pretrained(files)
                    merge_checkpoint(checkpoint, files, merged)
                    api = HfApi(endpoint)
                    api.create_repo(f"user/merged-files-{storage}")
                    api.upload_folder(repo_id=f"user/merged-files-{storage}", folder_path=merged)
                    model.merge_and_unload().push_to_hub(f"user/merged-memory-{storage}")
                    expected = logits(load(merged), input_ids)
                    pushed |= {f"user/merged-{way}-{storage}": expected for way in ("files", "memory")}
                if storage == "lfs":
                    model = tuned(checkpoint, method, seed=len(STORAGES))
                    model.push_to_hub(f"user/{method}-lfs", revision="v2")
                    pushed[f"user/{method}-lfs@v2"] = logits(model, input_ids)

    names = [[name for name in pushed if ("merged" in name) == merged] for merged in (True, False)]
    save_file({"input_ids": input_ids}, directory / "input.safetensors")
    with serve(hub) as endpoint:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(directory / "fresh_home"),
            "HF_TOKEN": "hf_user",
            "TORCHDYNAMO_DISABLE": "1",
        }
        arguments = [json.dumps(names), directory / "input.safetensors", directory / "output.safetensors"]
        result = subprocess.run(
            [sys.executable, "-c", PULL, *arguments], env=environment, capture_output=True, text=True, timeout=300
        )
    assert result.returncode == 0, result.stderr
    return pushed, load_file(directory / "output.safetensors"), hub


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_comes_back(round_trip, method, storage):
    pushed, pulled, hub = round_trip
    name = f"user/{method}-{storage}"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.files(name).keys()
    assert torch.equal(pulled[name], pushed[name])
    assert hub.repository(name)["private"] == (method == "lrec")


@pytest.mark.parametrize("method", CONFIGS)
def test_a_branch_comes_back(round_trip, method):
    pushed, pulled, _ = round_trip
    name = f"user/{method}-lfs"
    assert torch.equal(pulled[f"{name}@v2"], pushed[f"{name}@v2"])
    assert not torch.equal(pushed[f"{name}@v2"], pushed[name])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("way", ("files", "memory"))
def test_a_merged_checkpoint_is_served_without_peft_quant(round_trip, way, storage):
    pushed, pulled, _ = round_trip
    name = f"user/merged-{way}-{storage}"
    # dense weights lie at other places of the two files, and PyTorch's sums may be of another order there
    torch.testing.assert_close(pulled[name], pushed[name], rtol=1e-4, atol=1e-4)


def test_large_files_went_where_they_should(round_trip):
    hub = round_trip[2]
    weights = {storage: hub.files(f"user/peqa-{storage}")["adapter_model.safetensors"] for storage in STORAGES}
    assert [weights[storage]["large"] for storage in STORAGES] == [False, True, True]
    assert [weights[storage]["sha256"] in hub.xet_hashes() for storage in STORAGES] == [False, False, True]


@pytest.mark.parametrize(
    ("token", "message"),
    (
        (False, "401"),
        ("hf_wrong", "Invalid credentials in Authorization header"),
        ("hf_other", "You don't have the rights to write to user/private"),
    ),
)
@pytest.mark.parametrize("exists", (False, True))
def test_who_may_not_push_is_told_and_changes_nothing(hub, checkpoint, tmp_path, token, message, exists):
    if exists:
        hub.create("user/private", private=True)
    before = contents(hub.directory)
    with client(hub, tmp_path), pytest.raises(HfHubHTTPError, match=message):
        tuned(checkpoint).push_to_hub("user/private", token=token)
    assert contents(hub.directory) == before


@pytest.mark.parametrize(
    ("token", "error", "message"),
    (
        (False, RepositoryNotFoundError, "make sure you are authenticated"),
        ("hf_other", RepositoryNotFoundError, "your token has the required permissions"),
        ("hf_wrong", HfHubHTTPError, "Invalid credentials in Authorization header"),
    ),
)
def test_who_may_not_read_is_told(hub, tmp_path, token, error, message):
    hub.create("user/private", private=True)
    with client(hub, tmp_path), pytest.raises(ValueError, match=r"'adapter_config\.json' at 'user/private'") as raised:
        merge_checkpoint("user/base", "user/private", tmp_path / "merged", token=token)
    assert isinstance(raised.value.__cause__, error)
    assert message in str(raised.value.__cause__)
    assert not (tmp_path / "merged").exists()


def test_a_token_opens_a_private_repository(hub, checkpoint, tmp_path):
    model = tuned(checkpoint)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "expected")
    with client(hub, tmp_path), pytest.MonkeyPatch.context() as patch:
        model.push_to_hub("user/private", private=True)
        patch.delenv("HF_TOKEN")
        merge_checkpoint("user/base", "user/private", tmp_path / "merged", token="hf_user")
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_branch_is_swapped_in(hub, checkpoint, input_ids, tmp_path, method):
    model, new = tuned(checkpoint, method), tuned(checkpoint, method, seed=1)
    with client(hub, tmp_path):
        model.push_to_hub("user/adapter")
        new.push_to_hub("user/adapter", revision="v2")
        hotswap_adapter(model, "user/adapter", "default", revision="v2")
    assert torch.equal(logits(model, input_ids), logits(new, input_ids))


def read(hub, repository, path):
    return hub.object(hub.files(repository)[path]["sha256"]).read_text(encoding="utf-8")


@pytest.mark.parametrize("method", CONFIGS)
def test_the_card_is_there_and_edits_on_the_hub_survive(hub, checkpoint, tmp_path, method):
    model = tuned(checkpoint, method)
    with client(hub, tmp_path) as endpoint:
        model.push_to_hub("user/adapter")
        card = ModelCard(read(hub, "user/adapter", "README.md"))
        assert (card.data.library_name, card.data.base_model) == ("peft", "user/base")
        assert card.data.base_model_relation == "adapter"
        assert method in card.data.tags
        snippet = card.text.split("```python\n")[1]
        assert snippet.startswith("import peft_quant")
        assert '"user/adapter")' in snippet
        assert str(tmp_path) not in card.content

        card.data.license = "apache-2.0"
        HfApi(endpoint).upload_file(
            path_or_fileobj=f"---\n{card.data}\n---\nWritten on the Hub.\n{card.text}".encode(),
            path_in_repo="README.md",
            repo_id="user/adapter",
        )
        model.push_to_hub("user/adapter")
    card = ModelCard(read(hub, "user/adapter", "README.md"))
    assert card.data.license == "apache-2.0"
    assert "Written on the Hub." in card.text


def test_a_second_push_is_a_second_commit(hub, checkpoint, tmp_path):
    with client(hub, tmp_path):
        tuned(checkpoint).push_to_hub("user/adapter")
        first = hub.resolve("user/adapter", "main")
        tuned(checkpoint).push_to_hub("user/adapter")
        assert hub.resolve("user/adapter", "main") == first  # nothing new
        tuned(checkpoint, seed=1).push_to_hub("user/adapter", commit_message="Longer")
        with pytest.raises(HfHubHTTPError, match="already created"):
            huggingface_hub.create_repo("user/adapter")
    repository = hub.repository("user/adapter")
    second = repository["commits"][repository["branches"]["main"]]
    assert (second["title"], second["parent"]) == ("Longer", first)
    weights = [hub.files("user/adapter", revision)["adapter_model.safetensors"] for revision in (first, "main")]
    assert weights[0]["sha256"] != weights[1]["sha256"]


@pytest.fixture
def sharded(checkpoint, tmp_path):
    """A merged model to push in shards of 40 KB, and their sha256."""
    model = tuned(checkpoint).merge_and_unload()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    return model, [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards]


def test_an_upload_cut_once_is_taken_up_by_the_client(hub, sharded, tmp_path):
    model, shards = sharded
    hub.faults = {f"PUT /objects/{shards[0]}": [{"cut": 1000}]}
    with client(hub, tmp_path):
        model.push_to_hub("user/merged", max_shard_size="40KB")
    assert f"PUT /objects/{shards[0]} connection cut" in hub.requests
    assert sent(hub) == {f"/objects/{shard}": 1 for shard in shards}


def test_a_large_file_goes_in_parts_of_which_a_cut_one_is_sent_again(hub, sharded, tmp_path):
    model, shards = sharded
    hub.part_bytes = 10_000
    hub.faults = {f"PUT /objects/{shards[0]}/2": [{"cut": 1000}]}
    with client(hub, tmp_path):
        model.push_to_hub("user/merged", max_shard_size="40KB")
    parts = [request for request in hub.requests if request.startswith(f"PUT /objects/{shards[0]}/")]
    assert len(parts) > 4
    assert [part.rpartition("/")[2] for part in parts[:4]] == ["1 200", "2 connection cut", "2 200", "3 200"]
    assert {file["sha256"] for file in hub.files("user/merged").values() if file["large"]} == set(shards)


@pytest.mark.parametrize(
    "faults",
    (
        pytest.param({"PUT /objects/{shard}": [{"cut": 1000}] * 6}, id="every-try-cut"),
        pytest.param({"PUT /objects/{shard}": [{"status": 403}]}, id="upload-refused"),
        pytest.param(
            {"PUT /objects/{shard}": [{"status": 200}], "POST /objects/verify": [{"status": 200}] * 9},
            id="upload-lost",
        ),
        pytest.param({"POST /objects/verify": [{"status": 403}]}, id="verify-refused"),
        pytest.param({"POST /api/models/user/merged/commit": [{"status": 500}]}, id="commit-fails"),
        pytest.param({"POST /api/models/user/merged/commit": [{"cut": 1000}]}, id="commit-cut"),
    ),
)
def test_a_failed_push_shows_nothing_and_the_next_sends_the_rest(hub, sharded, tmp_path, monkeypatch, faults):
    model, shards = sharded
    hub.faults = {request.format(shard=shards[0]): list(planned) for request, planned in faults.items()}
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with client(hub, tmp_path):
        with pytest.raises((RuntimeError, HTTPError)):
            model.push_to_hub("user/merged", max_shard_size="40KB")
        assert hub.files("user/merged") == {}
        for path in (hub.directory / "objects").iterdir():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        assert sent(hub)[f"/objects/{shards[1]}"] == 1
        hub.faults = {}
        model.push_to_hub("user/merged", max_shard_size="40KB")
    assert sent(hub) == {f"/objects/{shard}": 1 for shard in shards}
    assert {file["sha256"] for file in hub.files("user/merged").values() if file["large"]} == set(shards)


def test_a_failed_commit_with_xet(hub, checkpoint, tmp_path):
    model = tuned(checkpoint)
    hub.faults = {"POST /api/models/user/adapter/commit": [{"status": 500}]}
    with client(hub, tmp_path, "xet"):
        with pytest.raises(HfHubHTTPError, match="500"):
            model.push_to_hub("user/adapter")
        stored = set(hub.directory.glob("xet/**/xorbs/xorbs/*"))
        assert hub.files("user/adapter") == {}
        model.push_to_hub("user/adapter")
    assert stored
    assert set(hub.directory.glob("xet/**/xorbs/xorbs/*")) == stored
    assert hub.files("user/adapter")["adapter_model.safetensors"]["sha256"] in hub.xet_hashes()


@pytest.mark.parametrize("strategy", ("end", "every_save", "checkpoint"))
def test_a_trainer_pushes_the_adapter(hub, checkpoint, input_ids, tmp_path, strategy):
    model = tuned(checkpoint)
    with client(hub, tmp_path):
        arguments = TrainingArguments(
            tmp_path / "out",
            push_to_hub=True,
            hub_model_id="user/trained",
            hub_strategy=strategy,
            save_steps=1,
            max_steps=2,
            report_to=[],
            use_cpu=True,
        )
        row = {"input_ids": input_ids[0], "labels": input_ids[0]}
        trainer = Trainer(model, arguments, train_dataset=[row])
        trainer.train()
        trainer.push_to_hub()
        path = snapshot_download("user/trained", cache_dir=tmp_path / "pulled")
    files = hub.files("user/trained")
    assert "model.safetensors" not in files
    assert ("last-checkpoint/optimizer.pt" in files) == (strategy == "checkpoint")
    assert "# PEQA adapter" in Path(path, "README.md").read_text()
    assert json.loads(Path(path, "peft_quant_facts.json").read_text())["facts"]["settings"]["training_steps"] == "2"
    pulled = PeftModel.from_pretrained(load(checkpoint), path)
    assert torch.equal(logits(pulled, input_ids), logits(model, input_ids))


def card_of(hub, repository):
    return ModelCard(read(hub, repository, "README.md"))


def test_an_int8_model(hub, tmp_path):
    model = int8_llama()
    model.config._name_or_path = "user/base"
    with client(hub, tmp_path):
        model.push_to_hub("user/int8")
        assert_equal(AutoModelForCausalLM.from_pretrained("user/int8"), model)
    card = card_of(hub, "user/int8")
    assert (card.data.library_name, card.data.base_model) == ("transformers", "user/base")
    assert {"qft", "peft-quant"} <= set(card.data.tags)
    snippet = card.text.split("```python\n")[1]
    assert snippet.startswith("import peft_quant")
    assert 'from_pretrained("user/int8")' in snippet
    assert "Model Card for Model ID" not in card.text


def test_edits_of_an_int8_models_card_survive(hub, tmp_path):
    model = int8_llama()
    with client(hub, tmp_path) as endpoint:
        model.push_to_hub("user/int8")
        edited = read(hub, "user/int8", "README.md") + "\nMy own words.\n"
        HfApi(endpoint).upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="user/int8")
        model.push_to_hub("user/int8")
    assert card_of(hub, "user/int8").text.endswith("My own words.\n")
    assert json.loads(read(hub, "user/int8", "peft_quant_facts.json"))["facts"]["method"] == "QFT"


def test_a_push_by_qft_trainer(hub, tmp_path):
    with client(hub, tmp_path):
        run = trainer(tmp_path / "out", push_to_hub=True, hub_model_id="user/trained", max_steps=2)
        run.train()
        run.push_to_hub(license="apache-2.0")
        assert_equal(AutoModelForCausalLM.from_pretrained("user/trained"), run.model)
    card = card_of(hub, "user/trained")
    assert card.data.license == "apache-2.0"
    assert "| training_steps | 2 |" in card.text
    assert json.loads(read(hub, "user/trained", "peft_quant_facts.json"))["facts"]["settings"]["training_steps"] == 2
    assert card.text.split("```python\n")[1].startswith("import peft_quant")
    assert not [name for name in hub.files("user/trained") if name.startswith("checkpoint")]


def test_exports_of_an_int8_model(hub, tmp_path, input_ids):
    model = int8_llama(dtype=torch.float32)
    with client(hub, tmp_path) as endpoint:
        for format in ("bf16", "gptq"):
            export_qft(model, tmp_path / format, format, inputs={"input_ids": input_ids})
            api = HfApi(endpoint)
            api.create_repo(f"user/{format}")
            api.upload_folder(repo_id=f"user/{format}", folder_path=tmp_path / format)
            assert "import peft_quant" not in card_of(hub, f"user/{format}").text
            assert "peft_quant_facts.json" in hub.files(f"user/{format}")
        AutoModelForCausalLM.from_pretrained("user/bf16")
