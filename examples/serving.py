"""One composition, ready for other people's tools: a LoRA for PEFT and vLLM and back, and a plain folder."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flix
from flix.backends.torch import adapt, export_peft, import_peft, merge, trainable_parameters

torch.manual_seed(0)
work = tempfile.TemporaryDirectory()
base, lora, plain = (Path(work.name, name) for name in ("base", "swa-ner", "merged"))
LlamaForCausalLM(
    LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2)
).save_pretrained(base)  # fmt: skip

registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["ner", "pos"]})
config = flix.FlixConfig(registry=registry, ranks=flix.ranks.by_group(language=4, task=8))
model = adapt(AutoModelForCausalLM.from_pretrained(base), config).eval()
with torch.no_grad():
    for parameter in trainable_parameters(model):  # stands for training
        parameter.normal_(std=0.1)

tokens = torch.randint(1, 300, (3, 10))
row = {"language": "swa", "task": "ner"}


@torch.no_grad()
def compare(what, other, **routing):
    wanted = model(tokens, flix_features=registry.encode([row] * 3)).logits
    difference = (other.eval()(input_ids=tokens, **routing).logits - wanted).abs().max().item()
    print(f"{what}: largest difference {difference:.1e}")
    assert difference < 1e-5


# A LoRA, exact; the message says whether vLLM serves it, and how.
result = export_peft(model, row, lora)
print(result.message)
compare(
    "opened by PEFT", PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
)

# LoRAs that PEFT wrote become features, here one; rows of other features may share its batches.
fresh = AutoModelForCausalLM.from_pretrained(base)
imported = import_peft(fresh, {"swa-ner": lora}, group="lora")
ids = imported.flix_config.registry.encode([{"lora": "swa-ner"}] * 3)
compare("imported again", imported, flix_features=ids)

# A folder that needs no flix.
merge(model, row).save_pretrained(plain)
compare("merged and reloaded", AutoModelForCausalLM.from_pretrained(plain))
work.cleanup()
