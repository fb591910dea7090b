"""Mixtures of datasets by temperature, with caps, streaming, and cells held out of training.

::

    from flix.data import Mixture
    mixture = Mixture(sources, held_out=[{"language": "swa", "task": "topic"}], temperature=2.0)
    print(mixture)
    trainer = Trainer(..., train_dataset=mixture.train, callbacks=[mixture.callback()])

It is built on Hugging Face's ``datasets``, which is imported when you make a mixture.
"""

from flix.core.features.cells import HeldOut, HeldOutError, MixtureError
from flix.data.mixture import Mixture
from flix.data.sources import Source

__all__ = ["HeldOut", "HeldOutError", "Mixture", "MixtureError", "Source"]
