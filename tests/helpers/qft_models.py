"""Small models in int8, of many families, and short runs of QFTTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from datasets import Dataset
from gptq_models import float_llama
from quick_training import SETTINGS, sequences
from torch import nn

from peft_quant import Int8Weight, QFTConfig, QFTTrainer, QFTTrainingArguments, convert_to_int8


WIDTH, VOCABULARY, LENGTH = 32, 128, 12
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {**_SIZES, **_TOKENS, "intermediate_size": 48, "max_position_embeddings": 64}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, **_TOKENS}
_DISTILBERT = {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY, "hidden_dim": 48}
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
_T5 |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
_BART = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_VIT = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VIT |= {"image_size": 16, "patch_size": 8}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_QWEN_VIT = {"depth": 2, "hidden_size": WIDTH, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
_QWEN_IMAGES = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
_EXPERTS = {**_DECODER, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """A tiny model of random weights, and what its task feeds it. Models of images and text get text.

    Attributes:
        model_class: of transformers.
        config_class: of transformers.
        options: of the config.
        heads: other classes that load its checkpoints, as they load those in float.
        gptq: whether transformers can load its layers as GPTQ.
    """

    model_class: str
    config_class: str
    options: dict[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    gptq: bool = True

    def config(self) -> Any:
        return getattr(transformers, self.config_class)(**self.options)

    def model(self, seed: int = 0) -> nn.Module:
        """The model in float, with noise on every parameter, so that no two are equal, as new norms and biases are."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(self.config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        return model

    def samples(self, count: int = 8) -> dict[str, list[Any]]:
        """Inputs and labels of its task."""
        ids = torch.randint(10, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(0))
        ids[:, -1] = _TOKENS["eos_token_id"]
        labels: dict[str, list[Any]] = {"labels": ids.tolist()}
        if "SequenceClassification" in self.model_class:
            labels = {"labels": [0, 1] * (count // 2)}
        elif "TokenClassification" in self.model_class:
            labels = {"labels": (ids % 2).tolist()}
        elif "QuestionAnswering" in self.model_class:
            labels = {"start_positions": [1] * count, "end_positions": [2] * count}
        return {"input_ids": ids.tolist(), **labels}

    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(values) for name, values in self.samples(2).items()}

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            outputs = model.eval()(**self.inputs())
        return torch.cat([value.float().flatten() for name, value in outputs.items() if name.endswith("logits")])


FAMILIES = {
    "Llama": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        _DECODER,
        (
            "LlamaModel",
            "LlamaForSequenceClassification",
            "LlamaForTokenClassification",
            "LlamaForQuestionAnswering",
        ),
    ),
    "Llama, tied": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_DECODER, "tie_word_embeddings": True},
        ("LlamaModel", "LlamaForSequenceClassification"),
    ),
    "Llama classifier": Family(
        "LlamaForSequenceClassification", "LlamaConfig", _DECODER, ("LlamaModel", "LlamaForCausalLM")
    ),
    "Qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 8}, ("Qwen3Model",)),
    "GPT-2": Family(
        "GPT2LMHeadModel", "GPT2Config", _GPT2, ("GPT2Model", "GPT2ForSequenceClassification"), gptq=False
    ),
    "OPT": Family("OPTForCausalLM", "OPTConfig", {**_ENCODER, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "Falcon": Family("FalconForCausalLM", "FalconConfig", {**_SIZES, **_TOKENS}, gptq=False),
    "BERT": Family(
        "BertForMaskedLM",
        "BertConfig",
        _ENCODER,
        ("BertModel", "BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"),
    ),
    "BERT classifier": Family(
        "BertForSequenceClassification", "BertConfig", _ENCODER, ("BertModel", "BertForMaskedLM")
    ),
    "BERT tokens": Family("BertForTokenClassification", "BertConfig", _ENCODER, ("BertForSequenceClassification",)),
    "BERT answers": Family("BertForQuestionAnswering", "BertConfig", _ENCODER, ("BertForSequenceClassification",)),
    "RoBERTa classifier": Family(
        "RobertaForSequenceClassification", "RobertaConfig", _ENCODER, ("RobertaModel", "RobertaForMaskedLM")
    ),
    "DistilBERT classifier": Family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _DISTILBERT,
        ("DistilBertModel", "DistilBertForMaskedLM"),
    ),
    "ModernBERT classifier": Family(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2},
        ("ModernBertModel",),
        gptq=False,
    ),
    "NomicBERT classifier": Family(  # whose files hold several weights as one
        "NomicBertForSequenceClassification", "NomicBertConfig", _ENCODER, ("NomicBertModel",)
    ),
    "T5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
        ("T5Model", "T5EncoderModel", "T5ForSequenceClassification"),
        gptq=False,
    ),
    "T5, untied": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        ("T5EncoderModel",),
        gptq=False,
    ),
    "BART": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
        ("BartModel", "BartForSequenceClassification", "BartForCausalLM"),
    ),
    "BART classifier": Family(
        "BartForSequenceClassification", "BartConfig", _BART, ("BartModel", "BartForConditionalGeneration")
    ),
    "Qwen2-VL": Family(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**_DECODER, **_MROPE},
            "vision_config": {**_QWEN_VIT, "embed_dim": WIDTH, "mlp_ratio": 2},
            **_QWEN_IMAGES,
        },
        ("Qwen2VLModel",),
    ),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_DECODER, **_MROPE},
            "vision_config": {
                **_QWEN_VIT,
                "intermediate_size": 48,
                "out_hidden_size": WIDTH,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **_QWEN_IMAGES,
        },
        ("Qwen2_5_VLModel",),
    ),
    "LLaVA": Family(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": {"model_type": "clip_vision_model", **_VIT},
            "image_token_index": 5,
            "vision_feature_layer": -1,
        },
        ("LlavaModel",),
    ),
    "Gemma 3 with images": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**_DECODER, "head_dim": 8, "sliding_window": 16},
            "vision_config": {**_VIT, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 3,
            "eoi_token_index": 4,
        },
        ("Gemma3Model",),
    ),
    "Mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 4},
        ("MixtralForSequenceClassification",),
    ),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_EXPERTS, "head_dim": 8}, ("Qwen3MoeModel",)),
    "Qwen2-MoE": Family("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
}


def int8_model(
    family: str, config: QFTConfig | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Any:
    """A family's model in int8; buffers that are not saved stay fp32, as in a model that is loaded."""
    model = FAMILIES[family].model(seed)
    saved = model.state_dict().keys()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved}
    model.to(dtype)
    for name, buffer in buffers.items():
        model.get_buffer(name).data = buffer
    return convert_to_int8(model, config)


def family_trainer(directory, family, model, **settings):
    """As [`trainer`], on the family's task."""
    data = Dataset.from_dict(FAMILIES[family].samples())
    return trainer(directory, model, trainer_options={"train_dataset": data, "eval_dataset": data}, **settings)


def int8_llama(config: QFTConfig | None = None, dtype: torch.dtype = torch.bfloat16, **options) -> nn.Module:
    """[`float_llama`] in int8; the frequencies of its positions stay fp32, as in a model that is loaded."""
    model = float_llama(**options)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = None
    model.to(dtype).model.rotary_emb = rotary
    return convert_to_int8(model, config)


def trainer(directory, model=None, trainer_class=QFTTrainer, trainer_options=None, **settings):
    arguments = QFTTrainingArguments(str(directory), **{**SETTINGS, "max_steps": 4, "learning_rate": 1e-3, **settings})
    options = {"train_dataset": sequences(), "eval_dataset": sequences(4), **(trainer_options or {})}
    return trainer_class(int8_llama() if model is None else model, arguments, **options)


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a model is made of, copied."""
    found = {}
    for name, tensor in model.state_dict().items():
        parts = tensor.parts if isinstance(tensor, Int8Weight) else {"": tensor}
        found |= {f"{name} {part}": value.clone() for part, value in parts.items()}
    return found


def assert_equal(model: nn.Module, other: nn.Module | dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    expected = other if isinstance(other, dict) else contents(other)
    found = contents(model)
    assert found.keys() == expected.keys()
    different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not different
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
