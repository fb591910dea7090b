"""The number of the current epoch, which worker processes see change."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context


class SharedEpoch:
    """A number in shared memory: workers that a ``DataLoader`` keeps alive between epochs read the new one.

    Forked and spawned workers share it; a copy or a pickle for any other purpose holds a number of its own.
    """

    def __init__(self, value: int = 0) -> None:
        self._shared = multiprocessing.RawValue("q", value)

    @property
    def value(self) -> int:
        """The epoch."""
        return int(self._shared.value)

    @value.setter
    def value(self, epoch: int) -> None:
        self._shared.value = epoch

    def __getstate__(self) -> dict[str, object]:
        # Shared memory can be handed to a process that is being spawned, and to nothing else.
        if multiprocessing.context.get_spawning_popen() is None:
            return {"value": self.value}
        return {"shared": self._shared}

    def __setstate__(self, state: dict[str, object]) -> None:
        if "shared" in state:
            self._shared = state["shared"]  # type: ignore[assignment]
        else:
            self.__init__(state["value"])  # type: ignore[misc, arg-type]
