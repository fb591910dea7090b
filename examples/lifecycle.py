"""A model's life after its first training: new languages, other people's files, merging, two adapters over one base."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flix
from flix.backends import torch as ft

torch.manual_seed(0)
settings = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
base = LlamaForCausalLM(settings)
tokens = torch.randint(0, 64, (8, 12))
registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["ner", "pos"]})
config = flix.FlixConfig(registry=registry, ranks=flix.ranks.by_group(language=2, task=8))


def train(model, row, steps=30):
    optimizer = torch.optim.AdamW(ft.trainable_parameters(model), lr=1e-2, fused=True)
    features = model.train().flix_config.registry.encode([row] * len(tokens))
    for _ in range(steps):
        loss = model(tokens, labels=tokens, flix_features=features).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


with tempfile.TemporaryDirectory() as folder:
    ann = ft.adapt(ft.share_base(base), config)  # two people, one base in memory
    ben = ft.adapt(ft.share_base(base), config)
    print(f"ann trains swa: loss {train(ann, {'language': 'swa', 'task': 'pos'}):.3f}")
    before = ft.named_pairs(ann)
    ft.add_feature(ann, "language", "yor", rank=4, init_from="swa")  # the others are frozen
    print(f"and then yor alone: loss {train(ann, {'language': 'yor', 'task': 'pos'}):.3f}")
    now = ft.named_pairs(ann)
    print("other features kept their bits:", all((now[n] == v).all() for n, v in before.items()))

    ft.save(ann, f"{folder}/yor", features={"language": "yor"})  # a file of one language
    ft.load_features(ben, f"{folder}/yor")
    print("ben has now:", ben.flix_config.registry.names("language"))
    try:
        ft.load_features(ben, ft.to_adapter(ann), {"language": "swa"})
    except flix.AdapterError as error:
        print("a conflict:", str(error)[:88], "...")
    ft.rename_feature(ben, "language", "yor", "yoruba")
    ft.remove_feature(ben, "language", "hau")  # its id stays reserved
    print("ben's languages:", ben.flix_config.registry.names("language"))

row = {"language": "swa", "task": "pos"}
routed = ann(tokens, flix_features=ann.flix_config.registry.encode([row] * 8)).logits
ft.merge_in_place(ann, row)  # ft.merge(ann, row) gives a plain copy instead
print("merged and routed differ by", f"{(ann(tokens).logits - routed).abs().max().item():.0e}")
ft.unmerge(ann)
with ft.disable(ann):
    print("disabled, it is its base:", torch.equal(ann(tokens).logits, base(tokens).logits))
