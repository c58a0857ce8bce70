"""What an aggregator is asked for. Imports nothing heavy: the processes that only pass it on do not compute."""

from dataclasses import dataclass, field

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverConfig:
    """Where covariances are solved."""

    device: str = "auto"
    """"cuda", "cpu", or "auto": a GPU where Ray gave this process one, else the CPU."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLimits:
    """What a shard waits for and holds."""

    deadline_seconds: float = 60.0
    """A record is stored incomplete when the last rank has not come this long after the first."""
    memory_bytes: int = 4 << 30
    """Groups being merged; beyond it couriers are told to push again later."""

    def __post_init__(self) -> None:
        for name in ("deadline_seconds", "memory_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """What `eigenwatch serve` was asked for."""

    store: str
    address: str | None = None
    """An existing Ray cluster; None starts a local one."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9845
    """0 takes a free one."""
    shards: int = 1
    solver: SolverConfig = field(default_factory=SolverConfig)
    limits: ShardLimits = field(default_factory=ShardLimits)

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise ValueError(f"shards must be at least 1, got {self.shards}")
