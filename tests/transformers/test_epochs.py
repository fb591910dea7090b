"""A mixture under the Trainer: each epoch draws its own rows, resumed epochs too."""

from __future__ import annotations

from typing import Any

from flix.data import Mixture
from tests.helpers.torch import live_pairs
from tests.helpers.transformers import (
    FlixCollator,
    FlixTrainer,
    classifier,
    datasets,
    rows,
    torch,
)


class Seen(FlixTrainer):
    """Keeps the first token of every row that it trains on."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = [*getattr(self, "seen", ()), *inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def run(folder, resume=None):
    from transformers import TrainingArguments

    given = [row for row in rows(40) if row["language"] is not None]
    mixture = Mixture(
        datasets.Dataset.from_list(given), columns=["language", "task"], epoch_size=18
    )
    model = classifier()
    trainer = Seen(
        model=model,
        args=TrainingArguments(
            str(folder), num_train_epochs=3, per_device_train_batch_size=4, save_steps=2, logging_steps=2,
            learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True, seed=1,
        ),
        data_collator=FlixCollator(model.flix_config),
        train_dataset=mixture.train,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    wanted = [sorted(mixture.epoch(epoch)["input_ids"][:], key=str) for epoch in range(3)]
    return trainer, {n: p.detach().clone() for n, p in live_pairs(model).items()}, wanted


def test_every_epoch_is_the_mixtures_own_and_resuming_goes_on_in_it(tmp_path):
    trainer, values, wanted = run(tmp_path)
    assert wanted[0] != wanted[1] != wanted[2]
    for epoch in range(3):
        part = trainer.seen[18 * epoch : 18 * (epoch + 1)]
        assert sorted(part, key=str) == wanted[epoch], f"epoch {epoch}"
    again, resumed, _ = run(tmp_path, resume=str(tmp_path / "checkpoint-8"))  # within epoch 1
    assert again.seen == trainer.seen[18 + 3 * 4 :]
    assert all(torch.equal(resumed[n], p) for n, p in values.items())
