"""Teachers, in memory, streamed and cached: what they say, and what they refuse."""

import hashlib
import json
import logging
import os

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from datasets import Dataset
from gptq_models import float_llama, load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from peft_quant import InvalidFileError, cache_teacher
from peft_quant.files import only_writer
from peft_quant.trainers.distillation import cache as module
from peft_quant.trainers.distillation.cache import CachedTeacher, data_fingerprint
from peft_quant.trainers.distillation.teacher import ModelTeacher


def samples(lengths=(5, 12, 9, 12, 7, 2, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 128, (length,), generator=generator).tolist()} for length in lengths]


def batch(rows, side="right"):
    """Padded rows with their mask."""
    width = max(len(row["input_ids"]) for row in rows)
    input_ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])
        where = slice(None, len(ids)) if side == "right" else slice(width - len(ids), None)
        input_ids[i, where], mask[i, where] = ids, 1
    return {"input_ids": input_ids, "attention_mask": mask}


def entries(directory):
    """The shards of a cache as they are."""
    manifest = json.loads((directory / "teacher.json").read_text())
    return {shard["file"]: (directory / shard["file"]).read_bytes() for shard in manifest["shards"]}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "_SHARD_BYTES", 1000)


@pytest.fixture
def cache(tmp_path, small_shards):
    return cache_teacher(float_llama(), samples(), tmp_path / "cache", k=8)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_logits_that_are_not_finite_are_not_cached(tmp_path, small_shards, value):
    def spoil(module, args, kwargs, output):
        if kwargs["input_ids"].shape[1] == 7:
            output.logits[0, 3, 5] = value

    teacher, rows = float_llama(), samples()
    handle = teacher.register_forward_hook(spoil, with_kwargs=True)
    message = rf"NaN or infinite logits for a sample of 7 tokens that begins with \[{rows[4]['input_ids'][0]}, "
    with pytest.raises(ValueError, match=message):
        cache_teacher(teacher, rows, tmp_path / "cache", k=8)
    written = entries(tmp_path / "cache")
    assert written
    handle.remove()
    cache_teacher(teacher, rows, tmp_path / "cache", k=8)
    assert written.items() <= entries(tmp_path / "cache").items()
    assert len(CachedTeacher(tmp_path / "cache").manifest["shards"]) > len(written)


def test_tokens_without_probability_are_cached(tmp_path):
    def forbid(module, args, output):
        output.logits[..., 5] = -torch.inf

    teacher = float_llama()
    teacher.register_forward_hook(forbid)
    cache_teacher(teacher, samples(), tmp_path / "cache", k=128)
    assert not CachedTeacher(tmp_path / "cache")(batch(samples())).has_nan()


class InterruptionError(Exception):
    pass


def fail_after(teacher, calls):
    """Make the forward pass fail after so many calls."""
    forward, left = teacher.forward, iter(range(calls))

    def counted(*args, **kwargs):
        if next(left, None) is None:
            raise InterruptionError
        return forward(*args, **kwargs)

    teacher.forward = counted
    return teacher


@pytest.mark.parametrize("side", ("right", "left"))
def test_a_cache_says_what_the_model_says(cache, side):
    rows = samples()
    inputs = batch(rows[::-1], side)
    cached = CachedTeacher(cache)(inputs).distribution
    logits = ModelTeacher(float_llama())(inputs).distribution
    log_probs = torch.log_softmax(logits, -1).flatten(0, 1)
    mask = inputs["attention_mask"].bool()
    has_next = torch.zeros_like(mask)
    has_next[:, :-1] = mask[:, :-1] & mask[:, 1:]
    kept = has_next.flatten()
    known = log_probs.gather(1, cached.indices.long())
    tail = 1 - known.exp().sum(-1)
    # fp16 keeps 11 bits of a logarithm of up to 16
    torch.testing.assert_close(cached.log_probs[kept, :-1].float(), known[kept], rtol=2**-11, atol=1e-4)
    torch.testing.assert_close(cached.log_probs[kept, -1].float().exp(), tail[kept], rtol=1e-2, atol=1e-3)
    assert (known[kept].sort(-1, descending=True).values == known[kept]).all()
    torch.testing.assert_close(known[kept, 0], log_probs[kept].amax(-1), rtol=0, atol=1e-4)


def test_the_log_says_what_it_will_take(tmp_path, caplog):
    caplog.set_level(logging.INFO, "peft_quant")
    teacher = float_llama()
    cache_teacher(teacher, samples(), tmp_path / "cache", k=8)
    tokens = sum(len(row["input_ids"]) - 1 for row in samples())
    (message,) = [record.message for record in caplog.records if record.name.startswith("peft_quant")]
    assert f"times less than the fp32 logits of {tokens} tokens" in message
    assert f"{4 * 128 / 34:.0f} times" in message
    assert f"{sum(p.nbytes for p in teacher.parameters()) / 1e6:.1f} MB on cpu" in message
    with safe_open(tmp_path / "cache" / "shard-00000.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in ("indices", "log_probs"))
    assert stored == tokens * 34
    assert "on disk" in str(CachedTeacher(tmp_path / "cache"))


def test_indices_of_a_large_vocabulary(tmp_path):
    config = {"vocab_size": 70_000, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    teacher = float_llama(**config, num_attention_heads=2, num_key_value_heads=2)
    rows = [{"input_ids": [3, 69_999, 4]}]
    cached = CachedTeacher(cache_teacher(teacher, rows, tmp_path / "cache", k=99))(batch(rows)).distribution
    expected = ModelTeacher(teacher)(batch(rows)).distribution[0, :2].topk(99).indices
    assert torch.equal(cached.indices[:2].long(), expected)
    assert expected.max() >= 1 << 16


@pytest.mark.parametrize("shuffle", (False, True))
def test_a_data_loader_gives_the_same_cache(cache, tmp_path, shuffle):
    torch.manual_seed(1)
    loader = DataLoader(samples(), batch_size=3, collate_fn=batch, shuffle=shuffle)
    batched = CachedTeacher(cache_teacher(float_llama(), loader, tmp_path / "batched", k=8))
    single = CachedTeacher(cache)
    assert batched.manifest["data"] == single.manifest["data"]
    for row in samples()[:-1]:
        actual, expected = (teacher(batch([row])).distribution for teacher in (batched, single))
        torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=1e-3, atol=1e-3)


def test_repeated_samples_are_kept_once(cache, tmp_path):
    twice = cache_teacher(float_llama(), Dataset.from_list(samples() * 2), tmp_path / "twice", k=8)
    assert CachedTeacher(twice).manifest == CachedTeacher(cache).manifest


def test_interrupted_it_goes_on_where_it_stopped(cache, tmp_path, small_shards):
    directory = tmp_path / "again"
    with pytest.raises(InterruptionError):
        cache_teacher(fail_after(float_llama(), 4), samples(), directory, k=8)
    kept = entries(directory)
    assert kept
    with pytest.raises(ValueError, match=r"incomplete: \d of 6 samples are missing. Call `cache_teacher` again"):
        CachedTeacher(directory)
    with pytest.raises(InterruptionError):
        cache_teacher(fail_after(float_llama(), 1), samples(), directory, k=8)
    cache_teacher(float_llama(), samples(), directory, k=8)
    assert kept.items() <= entries(directory).items()
    for row in samples():
        actual, expected = (CachedTeacher(path)(batch([row])).distribution for path in (directory, cache))
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    # complete, it needs no forward pass
    cache_teacher(fail_after(float_llama(), 0), samples(), directory, k=8)


@pytest.mark.parametrize("function", ("save_file", "_file_digest"))
def test_a_file_that_was_being_written_is_not_taken_for_complete(tmp_path, monkeypatch, small_shards, function):
    directory = tmp_path / "cache"
    original, left = getattr(module, function), iter(range(1))

    def interrupted(*args, **kwargs):
        if next(left, None) is None:
            if function == "save_file":
                args[1].write_bytes(b"half")
            raise InterruptionError
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, interrupted)
        with pytest.raises(InterruptionError):
            cache_teacher(float_llama(), samples(), directory, k=8)
    assert len(entries(directory)) == 1
    cache_teacher(float_llama(), samples(), directory, k=8)
    assert all(row in CachedTeacher(directory) for row in samples())


def test_one_process_at_a_time(cache, monkeypatch):
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    with only_writer(cache), pytest.raises(BlockingIOError, match="cache is being written by another process"):
        cache_teacher(float_llama(), samples(), cache, k=8)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


def test_an_interruption_before_the_first_file(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise InterruptionError

    with monkeypatch.context() as patch:
        patch.setattr(module.Path, "replace", interrupted)
        with pytest.raises(InterruptionError):
            cache_teacher(float_llama(), samples(), tmp_path / "cache", k=8)
    cache_teacher(float_llama(), samples(), tmp_path / "cache", k=8)


@pytest.mark.parametrize("damage", ("flip", "truncate", "remove"))
def test_damage_is_noticed(cache, damage):
    path = cache / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-10])
    else:
        path.unlink()
    message = f"shard-00001.safetensors is {'missing' if damage == 'remove' else 'damaged'}: remove .*cache"
    with pytest.raises(ValueError, match=message):
        CachedTeacher(cache)
    with pytest.raises(ValueError, match=message):
        cache_teacher(float_llama(), samples(), cache, k=8)


def edit_manifest(cache, **entries):
    manifest = json.loads((cache / "teacher.json").read_text())
    (cache / "teacher.json").write_text(json.dumps({**manifest, **entries}))


def refuse(cache, message):
    with pytest.raises(InvalidFileError, match=message):
        CachedTeacher(cache)
    with pytest.raises(InvalidFileError, match=message):
        cache_teacher(float_llama(), samples(), cache, k=8)


@pytest.mark.parametrize("content", (b"{", b"[]", b"\xff", b"[" * 10**5, b""))
def test_a_damaged_manifest_is_named(cache, content):
    (cache / "teacher.json").write_bytes(content)
    refuse(cache, r"teacher\.json")


@pytest.mark.parametrize("value", (None, "text", 1.5, True, {"a": 1}, [1], [{"file": "shard-00000.safetensors"}, {}]))
@pytest.mark.parametrize("name", ("teacher", "vocab_size", "k", "temperature", "data", "samples", "tokens", "shards"))
def test_entries_of_other_types_are_named(cache, name, value):
    if (name, value) in (("teacher", "text"), ("data", "text"), ("temperature", 1.5)):
        value = {}  # these are of the right type
    edit_manifest(cache, **{name: value})
    with pytest.raises(InvalidFileError, match=rf"teacher\.json has ({name}=|the shard)|shard-00000.* is damaged"):
        CachedTeacher(cache)


@pytest.mark.parametrize("k", (0, -1, 129, 10**12))
def test_a_k_that_the_vocabulary_does_not_have_is_named(cache, k):
    edit_manifest(cache, k=k)
    refuse(cache, rf"teacher\.json has k={k} and vocab_size=128")


@pytest.mark.parametrize("name", ("../other.safetensors", "/other.safetensors", "shard-00007.safetensors"))
def test_shards_of_other_names_are_not_read(cache, tmp_path, name):
    path = cache / "shard-00000.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.rename((cache / name) if not name.startswith("/") else tmp_path / "absolute")
    edit_manifest(cache, shards=[{"file": name, "sha256": digest}])
    refuse(cache, r"teacher\.json has the shard .*, whose file is not shard-00000\.safetensors")


def test_links_that_leave_the_cache_are_not_followed(cache, tmp_path):
    path = cache / "shard-00000.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refuse(cache, r"shard-00000\.safetensors is a link to .*elsewhere")
    path.unlink()
    os.mkfifo(path)
    refuse(cache, r"shard-00000\.safetensors is not a regular file")


@pytest.mark.parametrize(
    ("tensors", "message"),
    (
        ({"lengths": None}, "has other tensors than a shard with k=8"),
        ({"lengths": lambda lengths: lengths.int()}, "has other tensors than a shard with k=8"),
        ({"digests": lambda digests: digests[:1]}, "has other tensors than a shard with k=8"),
        ({"log_probs": lambda log_probs: log_probs[:, 1:].clone()}, "has other tensors than a shard with k=8"),
        ({"lengths": lambda lengths: lengths + 1}, "rows, and others in its samples"),
        ({"lengths": lambda lengths: -lengths}, "rows, and others in its samples"),
    ),
)
def test_a_shard_of_other_tensors_is_named(cache, tensors, message):
    rewrite_shard(cache, **tensors)
    refuse(cache, rf"shard-00000\.safetensors .*{message}")


@pytest.mark.parametrize(
    "tensors",
    (
        {"indices": lambda indices: (indices.int() + 128).to(torch.uint16)},
        {"lengths": lambda lengths: lengths.flip(0)},
    ),
)
def test_a_sample_of_other_entries_is_named(cache, tensors):
    rewrite_shard(cache, **tensors)
    with pytest.raises(InvalidFileError, match="tokens than its vocabulary and length allow"):
        for row in samples():
            CachedTeacher(cache)(batch([row]))


def rewrite_shard(cache, **changes):
    """Change tensors of the first shard, and its digest in the manifest."""
    path = cache / "shard-00000.safetensors"
    tensors = load_file(path)
    for name, change in changes.items():
        old = tensors.pop(name)
        if change is not None:
            tensors[name] = change(old).contiguous()
    save_file(tensors, path)
    manifest = json.loads((cache / "teacher.json").read_text())
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(cache, shards=manifest["shards"])


class Tokenizer:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"k": 9}, "it has k=8; asked for was k=9"),
        ({"temperature": 2.0}, "it has temperature=1.0; asked for was temperature=2.0"),
        ({"data": samples(seed=1)}, "it has data='[0-9a-f]{32}'; asked for was data='[0-9a-f]{32}'"),
        ({"data": samples()[:-2]}, "it has data=.*, samples=6, tokens=.*; asked for was data=.*, samples=5"),
        ({"teacher": float_llama(seed=1)}, "it has teacher='[0-9a-f]{32}'; asked for was teacher='[0-9a-f]{32}'"),
        ({"tokenizer": Tokenizer("a")}, "it has tokenizer=None; asked for was tokenizer='[0-9a-f]{32}'"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_cache_is_not_written_into(cache, change, message):
    before = entries(cache)
    arguments = {"teacher": float_llama(), "data": samples(), "directory": cache, "k": 8}
    with pytest.raises(ValueError, match=f"is another teacher cache: {message}.*another directory or remove it"):
        cache_teacher(**{**arguments, **change})
    assert entries(cache) == before


def test_bad_input(cache, tmp_path, checkpoint):
    teacher = float_llama()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other is not a teacher cache: it has no teacher\.json"):
        cache_teacher(teacher, samples(), tmp_path / "other")
    with pytest.raises(ValueError, match="absent is not a teacher cache"):
        CachedTeacher(tmp_path / "absent")
    for k in (0, 129):
        with pytest.raises(ValueError, match=f"k={k}: use 1 to 128"):
            cache_teacher(teacher, samples(), tmp_path / "new", k=k)
    with pytest.raises(ValueError, match=r"temperature=0\.0: use a positive number"):
        cache_teacher(teacher, samples(), tmp_path / "new", temperature=0.0)
    with pytest.raises(TypeError, match="`data` is a list_iterator, which can be read once"):
        cache_teacher(teacher, iter(samples()), tmp_path / "new")
    with pytest.raises(ValueError, match="no sample of two tokens"):
        cache_teacher(teacher, [{"input_ids": [3]}], tmp_path / "new")
    with pytest.raises(ValueError, match=r"these have \['position_ids'\]"):
        cache_teacher(teacher, [{"input_ids": [3, 4], "position_ids": [0, 0]}], tmp_path / "new")
    with pytest.raises(TypeError, match="The teacher is a Linear: give the float PreTrainedModel"):
        ModelTeacher(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="is GPTQ-quantized itself"):
        cache_teacher(load(checkpoint), samples(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"no entry for a sample of 3 tokens that begins with \[5, 5, 5\]"):
        CachedTeacher(cache)(batch([{"input_ids": [5, 5, 5]}]))
    manifest = json.loads((cache / "teacher.json").read_text())
    (cache / "teacher.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match="has format 2, known is 1"):
        CachedTeacher(cache)


def test_data_are_the_same_in_any_order_and_padding():
    rows = samples()
    assert data_fingerprint(rows) == data_fingerprint([batch(rows[3:], "left"), batch(rows[:4])])
    assert data_fingerprint(rows) != data_fingerprint(samples(seed=1))


# weights on disk are multiplied where they lie in their file, and PyTorch's sums may be of another order there
STREAMED = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=("cpu", "disk", "device_map"))
def streamed(request, tmp_path):
    """The float model, its weights kept elsewhere until a layer runs."""
    if request.param == "device_map":
        float_llama().save_pretrained(tmp_path / "float")
        places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "disk"}
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "float",
            device_map={**places, "model.rotary_emb": "cpu"},
            offload_folder=tmp_path / "offload",
            dtype=torch.float32,
        )
    if request.param == "cpu":
        return cpu_offload(float_llama())
    return disk_offload(float_llama(), tmp_path / "offload", execution_device=torch.device("cpu"))


def test_streamed_weights_say_the_same(streamed, tmp_path):
    whole, teacher = ModelTeacher(float_llama()), ModelTeacher(streamed)
    inputs = batch(samples())
    for hidden in (False, True):
        expected, actual = whole(inputs, hidden), teacher(inputs, hidden)
        torch.testing.assert_close(vars(actual), vars(expected), **STREAMED)
    assert teacher.fingerprint() == whole.fingerprint()
    assert any(parameter.is_meta for parameter in streamed.parameters())  # after the forward passes
    assert "offloaded and streamed, 0.0 MB at a time" in str(teacher)
    caches = [
        CachedTeacher(cache_teacher(model, samples(), tmp_path / str(i), k=8))
        for i, model in enumerate((streamed, whole.model))
    ]
    for row in samples()[:-1]:
        actual, expected = (cache(batch([row])).distribution.log_probs for cache in caches)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)  # kept in fp16


def test_a_tied_head_streams_too(tmp_path):
    inputs = batch(samples())
    expected = ModelTeacher(float_llama(tie_word_embeddings=True))(inputs).distribution
    streamed = disk_offload(float_llama(tie_word_embeddings=True), tmp_path, execution_device=torch.device("cpu"))
    torch.testing.assert_close(ModelTeacher(streamed)(inputs).distribution, expected, **STREAMED)


def test_the_last_hidden_state(tmp_path):
    model = float_llama()
    inputs = batch(samples())
    said = ModelTeacher(model)(inputs, hidden=True)
    assert torch.equal(said.hidden, model(**inputs, output_hidden_states=True).hidden_states[-1])
    assert torch.equal(model.lm_head(said.hidden), said.distribution)
    assert not model.lm_head._forward_pre_hooks
