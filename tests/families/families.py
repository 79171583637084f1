"""Checkpoints of the families that people have, tiny and random, as files.

`FAMILIES` has one of each. Their names in the files are those of the Hub: where transformers holds all experts of a
layer in one tensor, each expert has its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from defuser import convert_model
from gptq_models import quantize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPTQConfig, PreTrainedModel


GROUP = 32

_PACKED = re.compile(
    r"\.\d+\..*(proj|experts\.\d+|shared_mlp|fc\d?|dense|query|key|value|c_attn|c_fc|\.[qkvo]|wi_\d|wo|w[123])\.weight$"
)
_IN_FLOAT = re.compile(r"gate\.weight|router|shared_expert_gate|norm|embed|relative|conv|visual|vision|classifier")


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        model: name of its class in transformers.
        config: options of the class's config.
        task_type: of adapters.
        loaded_as: name of the class that it is loaded as; `model` by default.
        apart: whether its float checkpoint holds all experts of a layer in one tensor, which GPTQ files do not.
        bits: of layers, by a pattern of their names; the first that applies. None for layers in float.
        also_packed: pattern of further tensors that are packed.
        declared: further entries of the quantization config.
        packing: options of the packer.
        edit: what is done to the files in the end.
    """

    model: str
    config: dict[str, Any]
    task_type: str | None = "CAUSAL_LM"
    loaded_as: str | None = None
    apart: bool = False
    bits: dict[str, int | None] = field(default_factory=dict)
    also_packed: str = "(?!)"
    declared: dict[str, Any] = field(default_factory=dict)
    packing: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Path], None] | None = None

    def float_model(self) -> PreTrainedModel:
        """Random, with weights that make layers matter."""
        torch.manual_seed(0)
        model_class = getattr(transformers, self.model)
        model = model_class(model_class.config_class(**self.config)).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        model.tie_weights()
        return model

    def bits_of(self, name: str) -> int | None:
        if not (_PACKED.search(name) and not _IN_FLOAT.search(name)) and not re.search(self.also_packed, name):
            return None
        return next((bits for pattern, bits in self.bits.items() if re.search(pattern, name)), 4)

    def save(self, directory: Path) -> PreTrainedModel:
        """Write the checkpoint, and return the float model that it decodes to."""
        model = self.float_model().half()
        model.save_pretrained(directory)
        file = directory / "model.safetensors"
        if self.apart:
            convert_model(model)
        stored = (
            {name: tensor.clone() for name, tensor in model.state_dict().items()} if self.apart else load_file(file)
        )
        tensors, decoded = {}, {}
        for name, tensor in stored.items():
            bits = self.bits_of(name) if tensor.ndim == 2 else None
            if bits is None:
                tensors[name] = decoded[name] = tensor
                continue
            rows = tensor if "GPT2" in self.model else tensor.t()  # of Conv1D
            packed = quantize(rows.float(), bits, GROUP, **self.packing)
            weight = packed.weight if "GPT2" in self.model else packed.weight.t()
            decoded[name] = weight.contiguous()
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in packed.tensors.items()}
        if self.apart:
            model.float().load_state_dict(decoded)
        else:
            save_file(decoded, file, {"format": "pt"})
            model = type(model).from_pretrained(directory, dtype=torch.float32).eval()
        save_file(tensors, file, {"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        declared = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
        config["quantization_config"] = {**declared, "checkpoint_format": "gptq", **self.declared}
        (directory / "config.json").write_text(json.dumps(config))
        if self.edit is not None:
            self.edit(directory)
        return model

    def load(self, directory: Path, **options: Any) -> PreTrainedModel:
        """As users are told to."""
        model_class = getattr(transformers, self.loaded_as or self.model)
        kernel = GPTQConfig(bits=4, backend="gptq_torch")
        return model_class.from_pretrained(
            directory, quantization_config=kernel, **{"dtype": torch.float32, **options}
        ).eval()

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(12, 128, (2, 12), generator=generator)
        if self.model.startswith("Whisper"):
            return {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": ids}
        if self.task_type == "SEQ_2_SEQ_LM":
            return {"input_ids": ids, "decoder_input_ids": ids}
        return {"input_ids": ids}

    def outputs(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            output = model(**self.inputs)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state


def without_order(directory: Path) -> None:
    """As GPTQ-for-LLaMa wrote files."""
    file = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(".g_idx")}
    save_file(kept, file, {"format": "pt"})


def legacy_config(directory: Path) -> None:
    """As auto-gptq wrote configs."""
    config = json.loads((directory / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    legacy = {name: quantization[name] for name in ("bits", "group_size", "sym", "desc_act")}
    (directory / "quantize_config.json").write_text(json.dumps(legacy))


_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_DENSE = {**_SIZES, "intermediate_size": 96, "tie_word_embeddings": False}
_EXPERTS = {**_DENSE, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_GROUPED = {
    **_DENSE,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_TEXT = {name: _DENSE[name] for name in _DENSE if not name.endswith("token_id") and not name.startswith("tie")}
_LLAMA = Family("LlamaForCausalLM", _DENSE)

FAMILIES = {
    "Llama": _LLAMA,
    "Llama, tied embeddings": replace(_LLAMA, config={**_DENSE, "tie_word_embeddings": True}),
    "Llama, quantized head": replace(_LLAMA, also_packed=r"lm_head\.weight", declared={"lm_head": True}),
    "Llama, mixed bits": replace(
        _LLAMA,
        bits={"down_proj": 8, "v_proj": None, "up_proj": 3},
        declared={"dynamic": {r"+:.*down_proj": {"bits": 8}, r"+:.*up_proj": {"bits": 3}, r"-:.*v_proj": {}}},
    ),
    "Llama, no g_idx": replace(_LLAMA, edit=without_order),
    "Llama, of AutoRound (signed scales)": replace(_LLAMA, packing={"signed": True}),
    "Llama, quantize_config.json": replace(_LLAMA, edit=legacy_config),
    "Llama, as a classifier": replace(_LLAMA, task_type="SEQ_CLS", loaded_as="LlamaForSequenceClassification"),
    "Llama, without a head": replace(_LLAMA, task_type="FEATURE_EXTRACTION", loaded_as="LlamaModel"),
    "Phi-3": Family("Phi3ForCausalLM", _DENSE),
    "GPT-2": Family("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", {**_EXPERTS, "head_dim": 16}),
    "Mixtral": Family("MixtralForCausalLM", {**_DENSE, "num_local_experts": 4}),
    "OLMoE": Family("OlmoeForCausalLM", {**_EXPERTS, "intermediate_size": 32}),
    "Qwen2-MoE": Family("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        {
            **_GROUPED,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
        bits={"_a_proj": None},
    ),
    "GLM-4-MoE": Family("Glm4MoeForCausalLM", {**_GROUPED, "head_dim": 16}),
    "GPT-OSS": Family(
        "GptOssForCausalLM",
        {
            **_EXPERTS,
            "intermediate_size": 32,
            "num_local_experts": 4,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        apart=True,
    ),
    "Qwen3.5-MoE (linear attention)": Family(
        "Qwen3_5MoeForCausalLM",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 32,
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        apart=True,
        bits={"in_proj_[ab]": None},
    ),
    "Granite-4-H (Mamba, experts in float)": Family(
        "GraniteMoeHybridForCausalLM",
        {
            **_DENSE,
            "intermediate_size": 32,
            "shared_intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
        },
    ),
    "Mamba-2": Family(
        "Mamba2ForCausalLM",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "vocab_size": 128,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
            "expand": 2,
            "chunk_size": 8,
        },
    ),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
    ),
    "Gemma-3, vision and text": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "head_dim": 16},
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 9,
            "boi_token_index": 10,
            "eoi_token_index": 11,
        },
    ),
    "T5": Family(
        "T5ForConditionalGeneration",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 128,
            "feed_forward_proj": "gated-gelu",
        },
        task_type="SEQ_2_SEQ_LM",
    ),
    "BERT, classifier": Family(
        "BertForSequenceClassification",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "vocab_size": 128,
        },
        task_type="SEQ_CLS",
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "vocab_size": 128,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "pad_token_id": 2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 3,
        },
        task_type=None,
    ),
}
