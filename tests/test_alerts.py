"""Alerts on real training: a Post-LN model collapses, one breaks, and a healthy Pre-LN one raises none."""

import math

import torch
import torch.nn.functional as F
from eigenwatch.agent import attach
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from eigenwatch.cli.demo.text import documentation_bytes, random_windows
from eigenwatch.history import open_history

from tests.processes import wait_until
from tests.test_main_job import exposition

EVERY, STEPS, BREAKS_AT = 5, 60, 30


def train(
    served, run_id: str, config: DecoderConfig, lr: float, warm_up: int, broken_layer: int | None = None
) -> list[dict[str, str]]:
    """Trains on one rank; returns the labels of the alerts that the endpoint showed as active at the end.

    A weight of `broken_layer` becomes NaN at a sampled step, and with the gradients of that step everything else.
    """
    torch.manual_seed(0)
    model, text, draws = Decoder(config), documentation_bytes(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    with attach(model, run_id=run_id, every=EVERY, aggregator=served.address) as agent:
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / max(warm_up, 1))
            if step == BREAKS_AT and broken_layer is not None:
                model.layers[broken_layer].mlp.up_proj.weight.data[0, 0] = math.nan
            inputs, targets = random_windows(text, 8, 128, draws)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            agent.step(step)

        def recorded() -> dict[str, list] | None:
            shown = exposition(served.metrics_url)
            steps = {s.value for s in shown["eigenwatch_last_record_step"] if s.labels["run"] == run_id}
            return shown if steps == {STEPS - EVERY} else None

        shown = wait_until(recorded, "the last record on the endpoint")
    alerts = shown.get("eigenwatch_alert_active", [])
    return [sample.labels for sample in alerts if sample.labels["run"] == run_id and sample.value == 1]


def test_a_collapsing_model_raises_the_alert_on_the_endpoint_and_in_sql(served):
    active = train(served, "collapsing", DecoderConfig(norm="post", init_std=0.02), lr=1e-2, warm_up=0)
    assert active
    assert {(labels["kind"], labels["severity"], labels["site"]) for labels in active} == {
        ("collapse", "critical", "post")
    }
    with open_history(served.store) as history:
        rows = history.query("SELECT * FROM alerts WHERE run_id = 'collapsing' AND state = 'firing'").to_pylist()
        assert {str(row["layer"]) for row in rows} == {labels["layer"] for labels in active}
        for row in rows:
            assert "variance has sat in one or two directions" in row["reason"]
            evidence = history.query(
                "SELECT hard_rank, spectral_concentration FROM records"
                " WHERE run_id = 'collapsing' AND layer = ? AND list_contains(?, step)",
                [row["layer"], row["evidence_steps"]],
            ).to_pylist()
            assert len(evidence) == 3
            assert all(one["hard_rank"] <= 2 and one["spectral_concentration"] >= 0.97 for one in evidence)


def test_a_layer_that_breaks_says_where_it_began(served):
    active = train(served, "broken", DecoderConfig(norm="pre", layers=3), lr=3e-3, warm_up=30, broken_layer=1)
    assert {(labels["layer"], labels["kind"], labels["severity"]) for labels in active} == {
        (str(layer), "non_finite", "critical") for layer in range(3)
    }
    with open_history(served.store) as history:
        rows = history.query(
            "SELECT layer, since_step, reason, evidence_steps FROM alerts WHERE run_id = 'broken' ORDER BY layer"
        ).to_pylist()
    assert [row["since_step"] for row in rows] == [BREAKS_AT + EVERY, BREAKS_AT, BREAKS_AT]
    assert [row["evidence_steps"] for row in rows] == [[row["since_step"]] for row in rows]
    assert all(f"step {row['since_step']}" in row["reason"] for row in rows)


def test_a_healthy_model_raises_none(served):
    assert train(served, "healthy", DecoderConfig(norm="pre"), lr=3e-3, warm_up=30) == []
    with open_history(served.store) as history:
        assert history.query("SELECT * FROM alerts WHERE run_id = 'healthy'").num_rows == 0
