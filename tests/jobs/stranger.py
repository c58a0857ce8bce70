"""A client that speaks to an aggregator's actors as a courier does, but pushes every bad partial of the tests between
the good ones; prints what each was answered.

    python -m tests.jobs.stranger ADDRESS RUN_ID
"""

import json
import logging
import sys

import ray
from eigenwatch.schemas.delivery import COORDINATOR, NAMESPACE

from tests.aggregator.test_bad_partials import BAD
from tests.aggregator.test_shard import layer, partial, run

STEPS = range(100, 104)


def main() -> None:
    address, run_id = sys.argv[1:]
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    described = run(layer(), run_id=run_id).to_wire() | {"world_size": 2}
    coordinator, shard = ray.get_actor(COORDINATOR), ray.get_actor("shard-0")
    attempt = ray.get(coordinator.open_run.remote(described)).attempt
    ray.get(shard.open_run.remote(described, attempt))
    replies: dict[str, list[str]] = {}
    for step in STEPS:
        for rank in range(2):
            for what, bad in BAD.items():
                header = bad.header if bad.changes is None else bad.header | bad.changes
                if bad.run == "run":
                    header = header | {"run_id": run_id, "attempt": attempt}
                reply = ray.get(shard.push.remote(header, bad.mean, bad.payload))
                replies.setdefault(what, []).append(f"{reply.status} {reply.reason}")
            header, mean, scatter = partial(rank, step=step).to_wire()
            reply = ray.get(shard.push.remote(header | {"run_id": run_id, "attempt": attempt}, mean, scatter))
            replies.setdefault("good", []).append(reply.status)
    for rank in range(2):
        ray.get(coordinator.heartbeat.remote(run_id, attempt, rank, {}))
    print(json.dumps(replies))


if __name__ == "__main__":
    main()
