"""What reducing sends, counted where it is handed to torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """What one process passed to torch.distributed.

    Attributes:
        features: features whose gradients were reduced.
        registered: all features.
        calls: collective calls.
        told: bytes with which the processes told each other which features acted.
        sent: bytes of gradients.
        steps: how often gradients were reduced.
    """

    features: int = 0
    registered: int = 0
    calls: int = 0
    told: int = 0
    sent: int = 0
    steps: int = 0

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.told + self.sent

    def add(self, other: Traffic) -> None:
        """Add another count to this one."""
        self.features += other.features
        self.registered = other.registered
        self.calls += other.calls
        self.told += other.told
        self.sent += other.sent
        self.steps += other.steps

    def __str__(self) -> str:
        what = f"{self.features} of {self.registered:,} features"
        if self.steps != 1:
            what = f"{self.features:,} gradients of features in {self.steps:,} steps"
        return f"reduced {what}: {self.bytes:,} bytes in {self.calls:,} calls"
