"""The time of a training, for those that have only so much."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

_SECONDS = "seconds"


@dataclass
class Clock:
    """How much of the time of a training is over, the runs before a kill counted in; the same on every process."""

    limit: float | None  # seconds; None: as long as it takes
    numbers: dict[str, float]  # saved with checkpoints
    began: float = field(default_factory=time.monotonic)
    share: float = 0.0

    def __post_init__(self) -> None:
        self.before = self.numbers.get(_SECONDS, 0.0)

    def read(self) -> float:
        """Seconds so far, on this process."""
        return self.before + time.monotonic() - self.began

    def agree(self, seconds: float) -> None:
        """Take over what the processes have read together."""
        if self.limit is not None:
            self.numbers[_SECONDS], self.share = seconds, seconds / self.limit

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return self.share >= 1
