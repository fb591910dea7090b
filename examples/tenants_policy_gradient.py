"""Three tenants learn one policy each by rewards of their own (GRPO's baseline: the mean of a prompt's own samples),
sampled and trained together on one base. Random weights; runs offline, in seconds."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import flix
from flix.backends.torch import Tenants, adapt

torch.manual_seed(0)
VOCABULARY, NEW, SAMPLES = 16, 6, 12
base = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=16, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )
)  # fmt: skip
# What each wants of the tokens [n, NEW] that it sampled, from 0 to 1.
REWARDS = {
    "even": lambda tokens: (tokens % 2 == 0).float().mean(1),
    "large": lambda tokens: tokens.float().mean(1) / (VOCABULARY - 1),
    "rising": lambda tokens: (tokens[:, 1:] > tokens[:, :-1]).float().mean(1),
}
registry = flix.FeatureRegistry({"tenant": list(REWARDS)})
model = adapt(base, flix.FlixConfig(registry=registry, ranks=4))
tenants = Tenants(
    model, "tenant", torch.optim.AdamW, max_norm=1.0,
    lr={"even": 2e-2, "large": 1e-2, "rising": 2e-2},
    steps={"even": 25, "large": 20, "rising": 30},
)  # fmt: skip

history = {name: [] for name in REWARDS}
while tenants.active:
    owners = [name for name in tenants.active for _ in range(SAMPLES)]
    routing = registry.encode([{"tenant": name} for name in owners])
    prompts = torch.zeros(len(owners), 1, dtype=torch.long)
    with torch.no_grad():  # all tenants sample in one batch
        sampled = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), flix_features=routing,
            max_new_tokens=NEW, do_sample=True, top_k=0,
        )  # fmt: skip
    rewards = torch.cat([REWARDS[name](rows) for name, rows in zip(tenants.active, sampled[:, 1:].split(SAMPLES), strict=True)])  # fmt: skip
    groups = rewards.view(-1, SAMPLES)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    logits = model(sampled, attention_mask=torch.ones_like(sampled), flix_features=routing).logits[
        :, :-1
    ]
    chosen = logits.log_softmax(-1).gather(-1, sampled[:, 1:, None]).squeeze(-1)
    losses = tenants.losses(-(advantages.view(-1, 1) * chosen).mean(1), routing)
    sum(losses.values()).backward()
    for name, group in zip(tenants.active, groups, strict=True):
        history[name].append(group.mean().item())
    tenants.step()

for name, seen in history.items():
    first, last = (sum(part) / 5 for part in (seen[:5], seen[-5:]))
    print(f"{name}: {len(seen)} steps, reward {first:.2f} to {last:.2f}")
    assert last > first
