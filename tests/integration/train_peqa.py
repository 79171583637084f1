"""A few steps of PEQA with the stock Trainer, to be started by a launcher. Every process writes what it trained.

accelerate launch --multi_gpu --num_processes 2 train_peqa.py CHECKPOINT OUT PER_DEVICE_BATCH_SIZE
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig, Trainer, TrainingArguments, set_seed

from peft_quant import PEQAConfig


checkpoint, out, batch_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
set_seed(0)
kernel = GPTQConfig(bits=4, backend="gptq_torch")
model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=kernel, dtype=torch.float32)
model = get_peft_model(model, PEQAConfig(task_type="CAUSAL_LM"))
ids = (torch.arange(3, 99, 4)[:, None] + torch.arange(16)).tolist()
arguments = TrainingArguments(
    output_dir=out / "trainer",
    max_steps=3,
    per_device_train_batch_size=batch_size,
    learning_rate=2e-3,
    optim="sgd",  # moves by the gradient's size, so that a sum in place of a mean would show
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))
trainer.train()
trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
name = f"process{arguments.process_index}of{arguments.world_size}.safetensors"
save_file(trained, out / name)
trainer.save_model(out / "adapter")
trainer.accelerator.end_training()  # threads of the process group may abort a process that ends before them
