"""Model cards: what is in them, that their snippets run, and that they come out of the stock calls."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import transformers
from gptq_models import load, save_tiny_llama, tiny_config
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import peft_quant
from peft_quant import LRECConfig, PEQAConfig, export_lora, merge_checkpoint, write_model_card
from peft_quant.export import card_hooks


FACTS = {
    "license": "apache-2.0",
    "language": ["en"],
    "datasets": ["user/scriptures"],
    "settings": {"steps": 40, "learning rate": 3e-4},
    "command": "python tune.py --steps 40 > log",
    "perplexity": {"Scriptures": 21.994, "Wikipedia": 26.17},
    "compared_with": {"GPTQ": {"Scriptures": 30.8, "Wikipedia": 28.2}, "float": {"Wikipedia": 22.4}},
}
OLD = Path(__file__).parents[1] / "fixtures" / "adapters_0_1_0" / "peqa"
CONFIGS = {"peqa": PEQAConfig, "lrec": LRECConfig}
KINDS = ("peqa", "lrec", "lora", "merged")


def tuned(checkpoint, method="peqa", hub_id=None):
    start = {"init_weights": False} if method == "peqa" else {"init_lora_weights": False}
    model = get_peft_model(load(checkpoint), CONFIGS[method](task_type="CAUSAL_LM", **start))
    if hub_id:
        model.base_model.model.config._name_or_path = hub_id
        model.peft_config["default"].base_model_name_or_path = hub_id
    return model


def write(kind, checkpoint, directory, hub_id="user/base"):
    """A directory of a kind, with the card that its own writer gave it."""
    saved = directory.with_name("saved")
    tuned(checkpoint, "peqa" if kind in ("peqa", "merged") else "lrec", hub_id).save_pretrained(
        directory if kind in CONFIGS else saved
    )
    if kind == "lora":
        export_lora(saved, directory)
    if kind == "merged":
        merge_checkpoint(checkpoint, saved, directory)
    return directory


@pytest.fixture(scope="module")
def directories(checkpoint, tmp_path_factory):
    """One of each kind, with a base on the Hub. Not to be written to."""
    return {kind: write(kind, checkpoint, tmp_path_factory.mktemp(kind) / kind) for kind in KINDS}


def card_of(directory):
    return ModelCard.load(directory / "README.md")


def facts_of(directory):
    return json.loads((directory / "peft_quant_facts.json").read_text(encoding="utf-8"))


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def run(code, directory):
    environment = {**os.environ, "PYTHONPATH": str(Path(peft_quant.__file__).parents[1]), "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True)


def edit(directory, change):
    """Change a card as a user does, in an editor."""
    path = directory / "README.md"
    before = path.read_text(encoding="utf-8")
    after = change(before)
    assert after != before
    path.write_text(after, encoding="utf-8")


class TestContents:
    @pytest.mark.parametrize("kind", KINDS)
    def test_front_matter(self, directories, kind):
        card = card_of(directories[kind])
        adapter = kind != "merged"
        assert card.data.library_name == ("peft" if adapter else "transformers")
        assert card.data.base_model == "user/base"
        assert card.data.base_model_relation == ("adapter" if adapter else "finetune")
        assert card.data.pipeline_tag == "text-generation"
        assert {"gptq", "4-bit"} < set(card.data.tags)
        assert ("base_model:adapter:user/base" in card.data.tags) == adapter
        assert {"license", "datasets", "language", "model-index"}.isdisjoint(card.data.to_dict())

    @pytest.mark.parametrize("kind", KINDS)
    def test_only_sections_with_facts(self, directories, kind):
        text = card_of(directories[kind]).text
        assert "| bits | 4 |" in text
        assert "| group_size | 32 |" in text
        assert "## What was trained" in text
        assert "## Training" not in text
        assert "## Perplexity" not in text
        assert "{{" not in text
        assert "None" not in text
        assert "\n\n\n" not in text

    def test_what_was_trained_is_counted(self, directories, checkpoint):
        deltas = sum(p.numel() for n, p in tuned(checkpoint).named_parameters() if "peqa_scales" in n)
        assert (
            f"| scale deltas | 14 | {deltas:,} | fp32 | {deltas * 4 / 1e6:.3g} |" in card_of(directories["peqa"]).text
        )
        assert f"| scales | 14 | {deltas:,} | fp16 | {deltas * 2 / 1e6:.3g} |" in card_of(directories["merged"]).text
        branch = sum(p.numel() for n, p in tuned(checkpoint, "lrec").named_parameters() if "lora_" in n)
        for kind in ("lrec", "lora"):
            assert f"| low-rank matrices | 28 | {branch:,} | fp32 |" in card_of(directories[kind]).text

    @pytest.mark.parametrize("kind", KINDS)
    def test_facts_of_the_caller(self, checkpoint, tmp_path, kind):
        directory = write(kind, checkpoint, tmp_path / kind)
        card = ModelCard.load(write_model_card(directory, repository="user/tuned", tags=["scripture"], **FACTS))
        assert (card.data.license, card.data.language, card.data.datasets) == (
            "apache-2.0",
            ["en"],
            ["user/scriptures"],
        )
        assert "scripture" in card.data.tags
        assert [(r.metric_type, r.dataset_name, r.metric_value) for r in card.data.eval_results] == [
            ("perplexity", "Scriptures", 21.994),
            ("perplexity", "Wikipedia", 26.17),
        ]
        assert "| learning rate | 0.0003 |" in card.text
        assert "python tune.py --steps 40 > log\n" in card.text
        assert "| float |  | 22.40 |" in card.text
        assert "| this model | 21.99 | 26.17 |" in card.text
        assert '"user/tuned"' in snippets(card)[0]
        assert "this/repository" not in card.text

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_path_of_this_machine(self, checkpoint, tmp_path, kind):
        directory = write(kind, checkpoint, tmp_path / kind, hub_id=None)
        content = (directory / "README.md").read_text(encoding="utf-8")
        for text in (content, json.dumps(facts_of(directory))):
            assert str(checkpoint.parent) not in text
            assert str(tmp_path) not in text
        card = ModelCard(content)
        assert card.data.base_model is None
        assert "base_model_relation" not in card.data
        assert not any(tag.startswith("base_model") for tag in card.data.tags)
        assert "local directory, `llama`" in card.text

    def test_a_snapshot_of_the_hub_is_named_with_its_revision(self, directories, tmp_path):
        revision = "0123456789abcdef0123456789abcdef01234567"
        config = json.loads((directories["peqa"] / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = f"/cache/hub/models--some-org--a-model/snapshots/{revision}"
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        write_model_card(tmp_path)
        card = card_of(tmp_path)
        assert card.data.base_model == "some-org/a-model"
        assert f"revision `{revision}`" in card.text

    @pytest.mark.parametrize(
        ("quantization", "transformers_row", "vllm"),
        (
            ({"bits": 4, "group_size": 128, "sym": True}, "yes |", "yes:"),
            ({"bits": 8, "group_size": -1, "sym": True}, "yes |", "yes:"),
            ({"bits": 4, "group_size": -1, "sym": True}, "yes: on a CPU with", "yes:"),
            ({"bits": 4, "group_size": 128, "sym": False}, "yes |", "no:"),
            ({"bits": 3, "group_size": 128, "sym": True}, "yes |", "yes, with `--quantization humming`:"),
            ({"bits": 4, "group_size": 96, "sym": True}, "yes |", "no:"),
            ({"bits": 4, "group_size": 128}, "yes |", None),
        ),
    )
    def test_engines_follow_from_the_format(self, tmp_path, quantization, transformers_row, vllm):
        config = {"quantization_config": {"quant_method": "gptq", **quantization}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        write_model_card(tmp_path)
        rows = dict(re.findall(r"^\| (transformers|vLLM)[^|]*\| (.*)$", card_of(tmp_path).text, re.MULTILINE))
        assert rows["transformers"].startswith(transformers_row)
        assert rows["vLLM"].startswith(vllm) if vllm else "vLLM" not in rows

    def test_several_adapters_lie_in_folders(self, checkpoint, tmp_path):
        model = get_peft_model(load(checkpoint), PEQAConfig(task_type="CAUSAL_LM"), adapter_name="verse")
        model.save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert 'subfolder="verse"' in snippets(card)[0]
        assert "| scale deltas | 14 |" in card.text

    def test_examples_are_cards_of_today(self):
        examples = {file.stem: file for file in (Path(peft_quant.__file__).parent / "hub_cards/examples").glob("*.md")}
        assert examples.keys() == {"peqa_adapter", "lrec_adapter", "lora_export", "merged_gptq", "qft"}
        for kind, file in examples.items():
            card = ModelCard.load(file)
            headings = re.findall(r"^## (.+)$", card.text, re.MULTILINE)
            assert headings[0] == "Use"
            assert {"What was trained", "Limits", "Versions"} < set(headings)
            assert card.data.library_name == ("peft" if "adapter" in kind or "lora" in kind else "transformers")
            assert card.text.startswith("\n<!-- peft_quant: generated ")
            assert card.text.endswith("<!-- peft_quant: end -->\n")
            assert card.data.base_model is None

    def test_templates_are_shipped(self):
        names = {file.name for file in (files("peft_quant") / "hub_cards").iterdir() if file.name.endswith(".md")}
        assert {"peqa_adapter.md", "lrec_adapter.md", "lora_export.md", "merged_gptq.md", "qft.md"} < names


class TestSnippets:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_first_snippet_runs(self, directories, checkpoint, tmp_path, kind, input_ids):
        code = snippets(card_of(directories[kind]))[0]
        assert code.startswith("import peft_quant") == (kind in CONFIGS)
        assert ("peft_quant" in code) == (kind in CONFIGS)
        code = code.replace('"user/base"', repr(str(checkpoint))).replace(
            '"this/repository"', repr(str(directories[kind]))
        )
        code += f"\nimport torch\nlogits = model(input_ids=torch.tensor({input_ids.tolist()})).logits"
        code += "\nassert logits.isfinite().all()"
        result = run(code, tmp_path)
        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize(("kind", "made"), (("peqa", "merged"), ("lrec", "lora")))
    def test_the_second_snippet_makes_the_other_kind(self, directories, checkpoint, tmp_path, kind, made):
        code = snippets(card_of(directories[kind]))[1]
        assert code.startswith("import peft_quant")
        code = code.replace('"user/base"', repr(str(checkpoint))).replace(
            '"this/repository"', repr(str(directories[kind]))
        )
        result = run(code, tmp_path)
        assert result.returncode == 0, result.stderr
        written, expected = ((path / "README.md").read_text() for path in (tmp_path / made, directories[made]))
        assert written == expected
        written, expected = (facts_of(directory)["facts"] for directory in (tmp_path / made, directories[made]))
        assert written == expected


class TestEdits:
    def test_a_second_save_changes_nothing(self, checkpoint, tmp_path):
        model = tuned(checkpoint, hub_id="user/base")
        model.save_pretrained(tmp_path)
        write_model_card(tmp_path, **FACTS)
        first = (tmp_path / "README.md").read_text()
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == first

    def test_text_and_metadata_of_the_user_stay(self, checkpoint, tmp_path):
        model = tuned(checkpoint, hub_id="user/base")
        model.save_pretrained(tmp_path)
        write_model_card(tmp_path, **FACTS)
        edit(tmp_path, lambda text: text.replace("license: apache-2.0", "license: mit\ninference: false"))
        edit(tmp_path, lambda text: text.replace("- peft-quant\n", "- verse\n"))
        edit(tmp_path, lambda text: text.replace("pipeline_tag: text-generation\n", ""))
        edit(tmp_path, lambda text: text.replace("base_model: user/base", "base_model: user/mirror"))
        edit(tmp_path, lambda text: text.replace("---\n\n<!--", "---\n\n# My title\n\nAbove.\n\n<!--") + "\nBelow.\n")
        edit(tmp_path, lambda text: text.replace("| bits | 4 |", "| bits | 5 |"))
        model.save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert card.text.startswith("\n# My title\n\nAbove.\n\n<!--")
        assert card.text.endswith("end -->\n\nBelow.\n")
        assert "| bits | 4 |" in card.text
        assert (card.data.license, card.data.inference, card.data.base_model) == ("mit", False, "user/mirror")
        assert "verse" in card.data.tags
        assert "peft-quant" not in card.data.tags
        assert card.data.pipeline_tag is None
        assert "| this model | 21.99 | 26.17 |" in card.text

    def test_a_card_of_the_users_own_gets_metadata_only(self, checkpoint, tmp_path):
        (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- verse\n---\n# Mine\n\nAll of it.\n")
        tuned(checkpoint, hub_id="user/base").save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert card.text == "# Mine\n\nAll of it.\n"
        assert (card.data.license, card.data.library_name, card.data.base_model) == ("mit", "peft", "user/base")
        assert {"verse", "peqa"} < set(card.data.tags)

    def test_text_without_front_matter_stays(self, checkpoint, tmp_path):
        (tmp_path / "README.md").write_text("# Mine\n")
        tuned(checkpoint).save_pretrained(tmp_path)
        assert card_of(tmp_path).text == "# Mine\n"
        assert card_of(tmp_path).data.library_name == "peft"

    def test_a_lost_end_mark_makes_it_the_users_own(self, checkpoint, tmp_path):
        model = tuned(checkpoint)
        model.save_pretrained(tmp_path)
        edit(tmp_path, lambda text: text.replace("<!-- peft_quant: end -->", "My own end."))
        text = card_of(tmp_path).text
        model.save_pretrained(tmp_path)
        assert card_of(tmp_path).text == text

    @pytest.mark.parametrize(
        ("file", "content"),
        (
            pytest.param("README.md", b"---\ntags: [verse\n---\n# Mine\n", id="yaml"),
            pytest.param("README.md", b"---\n- a list\n---\n", id="no-mapping"),
            pytest.param("README.md", b"\xff\xfe\x00 Mine", id="bytes"),
            pytest.param(
                "README.md", b"<!-- peft_quant: generated by another\n{}\n-->\n<!-- peft_quant: end -->", id="text"
            ),
            pytest.param("peft_quant_facts.json", b"{", id="json"),
            pytest.param("peft_quant_facts.json", b"\xff", id="json-bytes"),
            pytest.param("peft_quant_facts.json", b'["weights", "facts", "metadata"]', id="json-list"),
            pytest.param(
                "peft_quant_facts.json", b'{"weights": 1, "facts": [1], "metadata": null}', id="json-foreign"
            ),
            pytest.param(
                "peft_quant_facts.json",
                b'{"weights": null, "facts": {"perplexity": {"text": "low"}}, "metadata": {}}',
                id="json-types",
            ),
            pytest.param("README.md", b"---\nlicense: &a [1]\ntags: *a\n---\n", id="alias"),
            pytest.param("README.md", b"#" * 1_000_001, id="long"),
        ),
    )
    def test_a_card_that_cannot_be_read_is_left_alone(self, checkpoint, tmp_path, file, content):
        (tmp_path / file).write_bytes(content)
        with pytest.warns(UserWarning, match=rf"The model card in {tmp_path} was left as it is\."):
            tuned(checkpoint).save_pretrained(tmp_path)
        written = {path.name for path in tmp_path.iterdir()}
        assert written == {file, "adapter_config.json", "adapter_model.safetensors"}
        assert (tmp_path / file).read_bytes() == content
        with pytest.raises(ValueError, match="mend or remove it"):
            write_model_card(tmp_path)

    def test_foreign_facts_do_not_stop_a_save(self, checkpoint, tmp_path):
        foreign = {"weights": None, "facts": {"base_quantization": 4, "base": [1]}, "metadata": {"tags": 1}}
        (tmp_path / "peft_quant_facts.json").write_text(json.dumps(foreign))
        with pytest.warns(UserWarning, match="left as it is"):
            tuned(checkpoint).save_pretrained(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").exists()
        assert facts_of(tmp_path) == foreign

    @pytest.mark.parametrize("part", ("<!-- peft_quant: generated -->", "<!-- peft_quant: generated ", "\n", "---\n"))
    def test_a_text_that_repeats_takes_no_longer(self, checkpoint, tmp_path, part):
        """Searches that begin again at every mark would take hours."""
        readme = "---\nlicense: mit\n---\n" + part * (900_000 // len(part))
        (tmp_path / "README.md").write_text(readme)
        model = tuned(checkpoint)
        start = time.monotonic()
        model.save_pretrained(tmp_path)
        assert time.monotonic() - start < 60
        assert card_of(tmp_path).data["license"] == "mit"

    def test_facts_of_another_type_are_refused(self, directories):
        with pytest.raises(ValueError, match=r"perplexity is .*'low'"):
            write_model_card(directories["peqa"], perplexity={"Wikipedia": "low"})

    def test_marks_in_values_are_no_marks(self, checkpoint, tmp_path):
        model = tuned(checkpoint)
        model.save_pretrained(tmp_path)
        edit(tmp_path, lambda text: text + "\nBelow.\n")
        write_model_card(tmp_path, settings={"note": "<!-- peft_quant: end -->\n<!-- peft_quant: generated -->"})
        first = (tmp_path / "README.md").read_text()
        assert first.count("<!-- peft_quant: ") == 2
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == first
        assert first.endswith("end -->\n\nBelow.\n")

    def test_an_editors_line_ends_and_byte_order_mark_change_nothing(self, checkpoint, tmp_path):
        model = tuned(checkpoint)
        model.save_pretrained(tmp_path)
        first = (tmp_path / "README.md").read_text()
        (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf" + first.replace("\n", "\r\n").encode())
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == first

    @pytest.mark.parametrize("description", (None, "transformers"))
    def test_the_libraries_own_templates_are_replaced(self, checkpoint, tmp_path, description):
        options = {}
        if description:
            options["model_description"] = (
                "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card "
                "has been automatically generated."
            )
        ModelCard.from_template(ModelCardData(library_name="transformers"), **options).save(tmp_path / "README.md")
        tuned(checkpoint).save_pretrained(tmp_path)
        assert "Model Card for Model ID" not in card_of(tmp_path).text
        assert card_of(tmp_path).data.library_name == "peft"

    def test_facts_of_other_weights_are_dropped(self, checkpoint, tmp_path):
        model = tuned(checkpoint, hub_id="user/base")
        model.save_pretrained(tmp_path)
        write_model_card(tmp_path, **FACTS)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "peqa_scales" in name:
                    parameter.mul_(2)
        model.save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert "## Perplexity" not in card.text
        assert "## Training" not in card.text
        assert card.data.eval_results is None
        assert card.data.license == "apache-2.0"

    def test_another_base_is_not_called_by_the_old_ones_name(self, checkpoint, tmp_path):
        tuned(checkpoint, hub_id="user/base").save_pretrained(tmp_path / "adapter")
        other = save_tiny_llama(tmp_path / "other", seed=1)
        tuned(other).save_pretrained(tmp_path / "adapter")
        card = card_of(tmp_path / "adapter")
        assert card.data.base_model is None
        assert "user/base" not in card.text


class TestFacts:
    def test_are_beside_the_card(self, directories):
        for kind, directory in directories.items():
            record = facts_of(directory)
            assert record.keys() == {"weights", "facts", "metadata"}
            assert record["facts"]["base"]["hub_id"] == "user/base"
            assert record["metadata"] == card_of(directory).data.to_dict(), kind
            assert "{" not in (directory / "README.md").read_text(encoding="utf-8").partition("# ")[0]

    def test_go_along_to_another_directory(self, checkpoint, tmp_path):
        model = tuned(checkpoint)
        model.save_pretrained(tmp_path / "first")
        write_model_card(tmp_path / "first", **FACTS)
        model.save_pretrained(tmp_path / "second")
        assert facts_of(tmp_path / "second") == facts_of(tmp_path / "first")
        first, second = ((tmp_path / name / "README.md").read_text() for name in ("first", "second"))
        assert first == second

    def test_are_enough_to_write_a_lost_card_again(self, checkpoint, tmp_path):
        model = tuned(checkpoint)
        model.save_pretrained(tmp_path)
        write_model_card(tmp_path, **FACTS)
        text = card_of(tmp_path).text
        (tmp_path / "README.md").unlink()
        write_model_card(tmp_path)
        assert card_of(tmp_path).text == text

    def test_of_a_card_that_had_them_in_a_comment_are_taken_over(self, tmp_path):
        shutil.copytree(OLD, tmp_path / "old")
        old = card_of(OLD)
        assert old.text.count('{"weights": ') == 1
        write_model_card(tmp_path / "old", command="make it")
        card, record = card_of(tmp_path / "old"), facts_of(tmp_path / "old")
        assert record["facts"]["perplexity"] == {"Scriptures": 21.994}
        assert record["facts"]["compared_with"] == {"GPTQ": {"Scriptures": 30.8}}
        assert (record["facts"]["repository"], record["facts"]["command"]) == ("user/old", "make it")
        assert '{"weights": ' not in card.text
        assert card.text.startswith("\n# My title\n\nAbove.\n\n<!-- peft_quant: generated ")
        assert card.text.endswith("end -->\n\nBelow.\n")
        assert card.text.count("## Use") == 1
        assert "| this model | 21.99 |" in card.text
        assert card.data.to_dict() == old.data.to_dict()  # without the pipeline, which a user took out
        first = (tmp_path / "old" / "README.md").read_text()
        write_model_card(tmp_path / "old")
        assert (tmp_path / "old" / "README.md").read_text() == first


class TestMerged:
    def test_the_bases_card_is_not_passed_off_as_its_own(self, checkpoint, tmp_path):
        base = save_tiny_llama(tmp_path / "base")
        (base / "README.md").write_text("---\nlicense: llama3\ntags:\n- theirs\n---\n# The base\n")
        tuned(base).save_pretrained(tmp_path / "adapter")
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
        card = card_of(tmp_path / "merged")
        assert "# The base" not in card.text
        assert "theirs" not in card.data.tags
        assert card.data.license == "llama3"

    def test_the_bases_facts_are_not_its_own(self, directories, tmp_path):
        base = shutil.copytree(directories["merged"], tmp_path / "base")
        write_model_card(base, **FACTS)
        tuned(base).save_pretrained(tmp_path / "adapter")
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
        assert not {"perplexity", "settings", "command"} & facts_of(tmp_path / "merged")["facts"].keys()
        assert card_of(tmp_path / "merged").data.license == "apache-2.0"

    def test_its_facts_are_kept(self, directories, tmp_path):
        directory = shutil.copytree(directories["merged"], tmp_path / "merged")
        write_model_card(directory, **FACTS)
        write_model_card(directory)
        card = card_of(directory)
        assert "| scales | 14 |" in card.text
        assert "| this model | 21.99 | 26.17 |" in card.text
        assert card.data.base_model == "user/base"


class TestErrors:
    def test_a_directory_without_a_model(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"neither an adapter_config\.json nor a config\.json"):
            write_model_card(tmp_path)

    def test_a_float_model(self, tmp_path):
        tiny_config().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="not a GPTQ checkpoint"):
            write_model_card(tmp_path)

    @pytest.mark.parametrize("peft_type", ("LORA", "IA3"))
    def test_adapters_of_other_methods(self, tmp_path, peft_type):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
        with pytest.raises(ValueError, match=f"a {peft_type} adapter, whose card PEFT writes"):
            write_model_card(tmp_path)
        assert not (tmp_path / "README.md").exists()


class Hub:
    """What pushing needs of the Hub's client: the repository's files, by name."""

    def __init__(self, tmp_path, monkeypatch):
        self.files = {}
        self.tmp_path = tmp_path
        self.repo_id = None
        monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: self)
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: self)
        monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", self.download)
        monkeypatch.setattr("peft_quant.export.card_hooks.hf_hub_download", self.download)

    def create_repo(self, repo_id, **_):
        self.repo_id = repo_id
        return self

    def download(self, repo_id, name, **_):
        if name not in self.files:
            raise EntryNotFoundError("no such file")
        path = self.tmp_path / name
        path.write_bytes(self.files[name])
        return path

    def create_commit(self, operations, **_):
        for operation in operations:
            with operation.as_file() as stream:
                self.files[operation.path_in_repo] = stream.read()

    def upload_folder(self, folder_path, **_):
        for name in ("README.md", "peft_quant_facts.json", "adapter_config.json"):
            with open(f"{folder_path}/{name}", "rb") as stream:
                self.files[name] = stream.read()

    @property
    def card(self):
        return ModelCard(self.files["README.md"].decode())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    return Hub(tmp_path / "hub", monkeypatch)


class TestPushing:
    @pytest.mark.parametrize("method", CONFIGS)
    def test_our_card_is_what_arrives(self, checkpoint, hub, method):
        tuned(checkpoint, method, "user/base").push_to_hub("user/tuned", tags=["verse"])
        assert {"adapter_config.json", "adapter_model.safetensors", "peft_quant_facts.json"} < hub.files.keys()
        assert json.loads(hub.files["peft_quant_facts.json"])["facts"]["repository"] == "user/tuned"
        assert (hub.card.data.library_name, hub.card.data.base_model) == ("peft", "user/base")
        assert hub.card.data.base_model_relation == "adapter"
        assert {"verse", method, "base_model:adapter:user/base"} < set(hub.card.data.tags)
        assert snippets(hub.card)[0].startswith("import peft_quant")
        assert 'PeftModel.from_pretrained(base, "user/tuned")' in hub.card.text
        assert "| 14 |" in hub.card.text or "| 28 |" in hub.card.text

    def test_a_local_base_is_not_named_by_its_path(self, checkpoint, hub):
        tuned(checkpoint).push_to_hub("user/tuned")
        assert hub.card.data.base_model is None
        assert str(checkpoint.parent).encode() not in hub.files["README.md"]

    def test_edits_on_the_hub_survive(self, checkpoint, hub):
        model = tuned(checkpoint, hub_id="user/base")
        model.push_to_hub("user/tuned")
        content = hub.files["README.md"].decode()
        content = content.replace("library_name: peft", "library_name: peft\nlicense: mit") + "\nBelow.\n"
        hub.files["README.md"] = content.encode()
        model.push_to_hub("user/tuned")
        assert hub.card.data.license == "mit"
        assert hub.card.text.endswith("Below.\n")
        assert hub.files["README.md"].decode() == content

    def test_what_is_taken_out_on_the_hub_stays_out(self, checkpoint, hub):
        tuned(checkpoint, hub_id="user/base").push_to_hub("user/tuned")
        content = hub.files["README.md"].decode()
        hub.files["README.md"] = (
            content.replace("- peft-quant\n", "").replace("pipeline_tag: text-generation\n", "").encode()
        )
        tuned(checkpoint, hub_id="user/base").push_to_hub("user/tuned")
        assert "peft-quant" not in hub.card.data.tags
        assert hub.card.data.pipeline_tag is None

    def test_facts_on_the_hub_stay(self, checkpoint, hub, tmp_path):
        torch.manual_seed(0)
        model = tuned(checkpoint)
        model.save_pretrained(tmp_path / "adapter")
        write_model_card(tmp_path / "adapter", **FACTS)
        model.push_to_hub("user/tuned")
        PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter").push_to_hub("user/tuned")
        assert "| this model | 21.99 | 26.17 |" in hub.card.text

    def test_a_card_on_the_hub_with_facts_in_a_comment_becomes_a_new_one(self, checkpoint, hub):
        hub.files["README.md"] = (OLD / "README.md").read_bytes()
        tuned(checkpoint, hub_id="user/base").push_to_hub("user/tuned")
        assert hub.card.text.startswith("\n# My title\n\nAbove.\n\n<!-- peft_quant: generated ")
        assert '{"weights": ' not in hub.card.text
        assert (hub.card.data.license, hub.card.data.base_model) == ("apache-2.0", "user/base")

    def test_a_card_that_cannot_be_read_does_not_stop_a_push(self, checkpoint, hub):
        hub.files["README.md"] = b"# Mine\n"
        hub.files["peft_quant_facts.json"] = b"{"
        with pytest.warns(UserWarning, match=r"The model card in user/tuned was left as it is\."):
            tuned(checkpoint).push_to_hub("user/tuned")
        assert "adapter_model.safetensors" in hub.files
        assert hub.card.text == "# Mine\n"

    def test_a_card_of_the_users_own_on_the_hub_stays(self, checkpoint, hub):
        hub.files["README.md"] = b"---\nlicense: mit\n---\n# Mine\n"
        tuned(checkpoint, hub_id="user/base").push_to_hub("user/tuned")
        assert hub.card.text == "# Mine\n"
        assert (hub.card.data.license, hub.card.data.base_model) == ("mit", "user/base")

    def test_facts_written_beside_the_saved_adapter_are_pushed(self, checkpoint, hub, tmp_path):
        model = tuned(checkpoint, hub_id="user/base")
        model.push_to_hub("user/tuned")
        model.save_pretrained(tmp_path / "adapter")
        write_model_card(tmp_path / "adapter", **FACTS)
        model.push_to_hub("user/tuned")
        assert "| this model | 21.99 | 26.17 |" in hub.card.text
        assert hub.card.data.license == "apache-2.0"
        assert len(hub.card.data.eval_results) == 2
        assert '"user/tuned"' in hub.card.text

    def test_the_trainers_push(self, checkpoint, hub, tmp_path, input_ids):
        model = tuned(checkpoint, hub_id="user/base")
        output = tmp_path / "output"
        output.mkdir()
        arguments = TrainingArguments(
            str(output), max_steps=2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True
        )
        rows = [{"input_ids": row, "labels": row} for row in input_ids]
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.hub_model_id = "user/tuned"
        trainer.train()
        trainer.push_to_hub(license="apache-2.0", language="en")
        assert (hub.card.data.library_name, hub.card.data.base_model) == ("peft", "user/base")
        assert (hub.card.data.license, hub.card.data.language) == ("apache-2.0", ["en"])
        assert {"peqa", "generated_from_trainer"} < set(hub.card.data.tags)
        assert snippets(hub.card)[0].startswith("import peft_quant")
        assert "More information needed" not in hub.card.text
        assert "| training_steps | 2 |" in hub.card.text

        edit(output, lambda text: text + "\nBelow.\n")
        trainer.push_to_hub()
        assert hub.card.text.endswith("Below.\n")
        assert hub.card.data.license == "apache-2.0"
        assert "| training_steps | 2 |" in hub.card.text


class TestOtherMethods:
    def model(self):
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config())
        model.config._name_or_path = "user/float"
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))

    def test_are_saved_and_pushed_as_peft_alone_does(self, hub, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path / "here")
        model.push_to_hub("user/lora")
        stock = PeftModel.create_or_update_model_card.__wrapped__
        (tmp_path / "stock").mkdir()
        stock(model, str(tmp_path / "stock"))
        here, expected = ((tmp_path / name / "README.md").read_text() for name in ("here", "stock"))
        assert here == expected
        assert "peft_quant" not in here
        # what transformers pushes: a card of its own
        assert hub.card.data.library_name == "transformers"
        assert "Model Card for Model ID" in hub.card.text

    def test_registering_again_changes_nothing(self):
        before = PeftModel.save_pretrained, PeftModel.create_or_update_model_card, PeftModel._upload_modified_files
        importlib.reload(card_hooks)
        after = PeftModel.save_pretrained, PeftModel.create_or_update_model_card, PeftModel._upload_modified_files
        assert after == before
