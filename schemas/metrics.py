"""The metrics of a record: one list from which columns, gauges, dashboards and documents take their names."""

from typing import NamedTuple


class Metric(NamedTuple):
    """A column of `records` and the gauge `eigenwatch_<name>`."""

    name: str
    help: str


METRICS = (
    Metric("hard_rank", "Participation ratio (sum λ)²/sum λ²: directions that dominate the variance."),
    Metric("soft_rank", "Shannon rank exp(H(p)): directions that carry variance, the tail included."),
    Metric("hard_utilization", "(hard rank - 1)/(D - 1)."),
    Metric("soft_utilization", "(soft rank - 1)/(D - 1)."),
    Metric("spectral_concentration", "How front-loaded the variance is: 0 flat, near 1 one direction."),
    Metric("utilization_index", "Harmonic mean of hard and soft utilization."),
    Metric("effective_dimension", "1 + (D - 1) times the utilization index: directions in use."),
    Metric("top1_share", "Share of the variance in the first direction."),
    Metric("variance_10", "Share of the variance in the first 10 % of directions."),
    Metric("variance_25", "Share of the variance in the first 25 % of directions."),
    Metric("variance_50", "Share of the variance in the first 50 % of directions."),
    Metric("power_law_alpha", "Exponent α of the fit λ_k ∝ k^-α."),
    Metric("power_law_r2", "R² of the power-law fit."),
    Metric("js_divergence", "Jensen-Shannon divergence of the pre and post spectra, in nats."),
    Metric("hard_rank_corrected", "Hard rank without its finite-sample bias."),
    Metric("soft_rank_corrected", "Soft rank, first-order bias correction; null where N < 2D."),
    Metric("total_variance", "Trace of the covariance."),
)

METRIC_NAMES = tuple(metric.name for metric in METRICS)

DATA_QUALITY = (
    Metric("width", "Width D of the feed-forward layer."),
    Metric("tokens", "Activation rows that entered the covariance."),
    Metric("tokens_per_width", "Tokens divided by width; ranks are biased where it is small."),
    Metric("complete", "1 if every expected rank contributed to the last record."),
    Metric("finite", "1 if the activations of the last record were finite."),
    Metric("sampling_steps", "Steps between two samples of this layer, as scheduled when it was last sampled."),
    Metric("overhead_ratio", "Training time that the observation costs, amortised over all steps; the slowest rank."),
)
"""Columns that say how far a record can be trusted; gauges too."""
