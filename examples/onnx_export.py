"""One composition of an adapted BERT as an ONNX file, for any batch and length; onnxruntime answers as torch does."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from transformers import BertConfig, BertForSequenceClassification

import flix
from flix.backends.torch import adapt, merge, trainable_parameters

torch.manual_seed(0)
base = BertForSequenceClassification(
    BertConfig(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
               num_attention_heads=4, max_position_embeddings=64, num_labels=3)
)  # fmt: skip
registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["topic", "sentiment"]})
model = adapt(
    base, flix.FlixConfig(registry=registry, ranks=flix.ranks.by_group(language=2, task=4))
)
with torch.no_grad():
    for parameter in trainable_parameters(model):  # stands for training
        parameter.normal_(std=0.2)

row = {"language": "swa", "task": "topic"}
merged = merge(model.eval(), row)  # a plain model


class Logits(torch.nn.Sequential):  # tensors in, a tensor out
    def forward(self, input_ids, attention_mask):
        return self[0](input_ids=input_ids, attention_mask=attention_mask).logits


def inputs(rows, length):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return torch.randint(1, 200, (rows, length)), mask


batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
program = torch.onnx.export(
    Logits(merged).eval(), inputs(3, 12), dynamo=True, verbose=False,
    input_names=["input_ids", "attention_mask"], output_names=["logits"],
    dynamic_shapes={name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")},
)  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "swa-topic.onnx")
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows, tokens in ((1, 5), (4, 12), (7, 40)):
        ids, mask = inputs(rows, tokens)
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            wanted = model(ids, mask, flix_features=registry.encode([row] * rows)).logits
        difference = abs(found - wanted.numpy()).max()
        print(f"{rows} rows of {tokens} tokens: largest difference {difference:.1e}")
        assert difference < 1e-5
