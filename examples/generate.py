"""Generate for rows of several languages and tasks in one batch, and use a pipeline. Random weights: only the plumbing
is real. Needs `transformers`; runs offline, in seconds."""

import torch
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, pipeline

import flix
from flix.backends.torch import adapt, merge, routed, trainable_parameters

torch.manual_seed(0)
tokenizer = ByT5Tokenizer(padding_side="left")
base = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=128,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )
)  # fmt: skip

registry = flix.FeatureRegistry({"language": ["hau", "swa", "yor"], "task": ["ner", "news"]})
config = flix.FlixConfig(registry=registry, ranks=flix.ranks.by_group(language=4, task=8))
model = adapt(base.double(), config).eval()
with torch.no_grad():
    for parameter in trainable_parameters(model):  # stands for training: updates start at zero
        parameter.normal_(std=0.1)

texts = ["Ina kwana", "Habari za asubuhi", "Bawo ni"]
rows = [
    {"language": "hau", "task": "ner"},
    {"language": {"swa": 0.7, "hau": 0.3}, "task": "news"},  # code-switched
    {"language": "yor", "task": "ner"},
]
routing = registry.encode(rows)
prompts = tokenizer(texts, return_tensors="pt", padding=True)

ways = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}
for way, options in ways.items():
    mixed = model.generate(**prompts, flix_features=routing, max_new_tokens=8, **options)
    print(f"{way}: {len(mixed)} sequences for {len(rows)} rows")
    if not options["do_sample"]:  # a mixed batch gives each row what it gets alone
        for i in range(len(rows)):
            row = {key: value[i : i + 1] for key, value in prompts.items()}
            alone = model.generate(**row, flix_features=routing[i], max_new_tokens=8, **options)
            assert torch.equal(mixed[i * len(alone) : (i + 1) * len(alone)], alone)

# Where the caller has no keyword for routing: one composition for all that happens inside.
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
options = {"max_new_tokens": 8, "do_sample": False, "return_tensors": True}
with routed(model, rows[0]):
    found = pipe(texts, batch_size=2, **options)
plain = pipeline("text-generation", model=merge(model, rows[0]), tokenizer=tokenizer, device="cpu")
assert found == plain(texts, batch_size=2, **options)
print("pipeline:", len(found), "answers under", rows[0])
