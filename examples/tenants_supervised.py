"""Three tenants fine-tune one base in mixed batches, each with its own rank, learning rate, schedule and steps; one is
saved and goes on in another run. Random weights: only the plumbing is real. Runs offline, in seconds."""

import random

import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

import flix
from flix.backends.torch import Tenants, adapt

tokenizer = ByT5Tokenizer()
WORDS = ["river", "stone", "winter", "garden", "letter", "window", "bread", "house"]
TASKS = {"ann": str.upper, "ben": lambda w: w[::-1], "cyd": lambda w: w[0] * 3, "dan": str.title}


def adapted(ranks):
    torch.manual_seed(0)  # the same base for all
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 2, "n_head": 2}
    base = GPT2LMHeadModel(GPT2Config(**sizes, **none, bos_token_id=1, eos_token_id=1))
    registry = flix.FeatureRegistry({"tenant": list(ranks)})
    return adapt(base, flix.FlixConfig(registry=registry, ranks={"tenant": ranks}))


def train(tenants, draw):
    """Mixed batches of the tenants that still train, until all have stopped."""
    registry, losses = tenants.model.flix_config.registry, {}
    while tenants.active:
        rows = [(name, draw.choice(WORDS)) for name in tenants.active for _ in range(4)]
        texts = [f"{word} {TASKS[name](word)}" for name, word in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)[:, 1:]
        routing = registry.encode([{"tenant": name} for name, _ in rows])
        logits = tenants.model(**batch, flix_features=routing).logits[:, :-1]
        tokens = F.cross_entropy(logits.mT, labels, reduction="none")
        found = tenants.losses(tokens, routing, counts=labels != -100)
        sum(found.values()).backward()
        tenants.step()
        for name, loss in found.items():
            losses.setdefault(name, []).append(loss.item())
    for name, seen in losses.items():
        print(f"{name}: {tenants[name].taken} steps, loss {seen[0]:.2f} to {seen[-1]:.2f}")


model = adapted({"ann": 8, "ben": 4, "cyd": 2})
rates, limits = {"ann": 1e-2, "ben": 2e-2, "cyd": 1e-2}, {"ann": 30, "ben": 20, "cyd": 25}
cosine = {"ben": lambda optimizer: CosineAnnealingLR(optimizer, limits["ben"])}
adamw = torch.optim.AdamW
tenants = Tenants(model, "tenant", adamw, lr=rates, steps=limits, schedule=cosine, max_norm=1.0)
train(tenants, random.Random(0))

tenants.save("ann", "ann")  # an adapter that others load, and the training's state
others = Tenants(adapted({"dan": 4}), "tenant", adamw, lr=1e-2, steps=15)
others.resume("ann", "ann", steps=40)  # beside another neighbour, ten steps more
train(others, random.Random(1))
