"""What an aggregator is asked for. Imports nothing heavy: the processes that only pass it on do not compute."""

from dataclasses import dataclass, field

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("float64", "float32")
METHODS = ("exact", "slq")


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverConfig:
    """Where and how covariances are solved."""

    device: str = "auto"
    """"cuda", "cpu", or "auto": a GPU where Ray gave this process one, else the CPU."""
    precision: str = "float64"
    """Of the first try on a GPU, "float64" or "float32"; the other is the second. A CPU takes float64."""
    method: str = "exact"
    """"exact", or "slq": an estimate by stochastic Lanczos quadrature, a preview for layers too wide to be solved."""
    slq_width: int = 4096
    """Matrices smaller than this are solved exactly, whatever `method` says; at least 256."""
    own_process: bool = False
    """Whether a child of the shard solves, which may be killed at any time, or the shard itself, on the CPU."""
    timeout_seconds: float = 60.0
    """A solver process that has not answered this long after what its matrix should take at the very most is killed."""

    def __post_init__(self) -> None:
        for name, known in (("device", DEVICES), ("precision", PRECISIONS), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.slq_width < 256:
            raise ValueError(f"slq_width must be at least 256, got {self.slq_width}")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be positive, got {self.timeout_seconds}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLimits:
    """What a shard waits for and holds."""

    deadline_seconds: float = 60.0
    """A record is stored incomplete when the last rank has not come this long after the first."""
    memory_bytes: int = 4 << 30
    """Groups being merged; beyond it couriers are told to push again later."""
    behind_seconds: float = 30.0
    """Where a record has waited longer for the solver its run is asked to sample less."""

    def __post_init__(self) -> None:
        for name in ("deadline_seconds", "memory_bytes", "behind_seconds"):
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
    away_seconds: float = 30.0
    """The others take over the layers of a shard that has not answered for so long."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    limits: ShardLimits = field(default_factory=ShardLimits)

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise ValueError(f"shards must be at least 1, got {self.shards}")
        if self.away_seconds <= 0:
            raise ValueError(f"away_seconds must be positive, got {self.away_seconds}")
