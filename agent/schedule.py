"""When to sample: every N steps, the same on every rank."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Every:
    """Samples the first step seen, then the first step at or after each multiple of `steps`.

    It looks only at step numbers, so ranks that step together sample together. A stride other than one (a trainer that
    counts micro-steps) is learnt from the second step.
    """

    steps: int

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"every must be a positive integer number of steps, got {self.steps!r}")

    def due(self, step: int, last_sampled: int | None) -> bool:
        """Whether `step` is sampled, given the last step that was."""
        return last_sampled is None or step // self.steps > last_sampled // self.steps
