"""Mix datasets by temperature, hold two cells out, go through epochs, and stream. Made-up data; needs `datasets`."""

from collections import Counter
from itertools import islice

import datasets

import flix
from flix.data import Mixture, Source

SIZES = {
    ("hau", "ner"): 900, ("swa", "ner"): 300, ("yor", "ner"): 40,
    ("hau", "topic"): 500, ("swa", "topic"): 120, ("yor", "topic"): 60,
}  # fmt: skip


def rows(language, task, count):
    texts = [f"{language} sentence {i} for {task}" for i in range(count)]
    return datasets.Dataset.from_dict({"text": texts, "language": [language] * count})


sources = [  # their rows name the language, they themselves the task
    (datasets.concatenate_datasets([rows(*cell, n) for cell, n in SIZES.items() if cell[1] == task]),
     {"task": task})
    for task in ("ner", "topic")
]  # fmt: skip

mixture = Mixture(
    sources,
    temperature=2.0,
    cap={"task": {"ner": 400}},
    held_out=[{"language": "swa", "task": "topic"}, {"language": "yor", "task": "topic"}],
)
print(mixture, "\n")

# Epochs: each takes the next rows of every cell. A DataLoader or Trainer reads mixture.train.
seen = Counter()
for epoch in range(3):
    mixture.train.set_epoch(epoch)
    seen.update(row["text"] for row in mixture.train)
assert not {t for t in seen if t.startswith(("swa", "yor")) and t.endswith("topic")}
print(f"3 epochs, {seen.total():,} draws, {len(seen):,} different rows, none of a held-out cell")
print(f"held out for evaluation: {Counter(mixture.held_out['language'][:])}")

# What the model is made for: the mixture's features, ranks by their data.
registry = mixture.registry()
ranks = flix.ranks.proportional(budget=40, sizes=mixture.feature_sizes())
print({"=".join(feature): rank for feature, rank in ranks(registry).items()}, "\n")

# Streaming: a source that can only be read from front to back, beside the others.
web = datasets.IterableDataset.from_generator(lambda: ({"text": f"row {i}"} for i in range(200)))
stream = Mixture(
    [*sources, Source(web, {"language": "ibo", "task": "ner"}, size=200)],
    held_out=mixture.excluded,
).stream(shuffle_buffer=100)
drawn = Counter(f"{row['language']}/{row['task']}" for row in islice(stream, 2000))
print("2,000 rows of a stream:", dict(drawn.most_common()))
assert "swa/topic" not in drawn and "yor/topic" not in drawn
