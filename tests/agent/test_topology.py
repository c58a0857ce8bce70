"""What attach says of a model's places before the first step."""

import torch
from eigenwatch.agent import Schedule
from eigenwatch.agent.observation import Place
from eigenwatch.agent.parallel import Spread
from eigenwatch.agent.topology import Observed, tight_room
from eigenwatch.schemas import packed_length
from torch import nn

WIDTH = 512


def places(count: int, rotate: int = 1) -> list[Observed]:
    return [
        Observed(
            Place(layer=k, site="post", name=f"h.{k}", width=WIDTH, share=0, block=(0, WIDTH)),
            nn.Linear(WIDTH, 1, device=torch.device("meta")),
            Schedule(rotate=rotate),
            Spread((0,)),
            None,
        )
        for k in range(count)
    ]


def test_scatters_that_do_not_fit_into_host_memory_together_are_told_of_with_the_remedy():
    room = 6 * 4 * packed_length(WIDTH)
    assert tight_room(places(6), room) is None
    assert tight_room(places(12, rotate=2), room) is None
    said = tight_room(places(13), room)
    assert "a sample of 13 places" in said
    assert f"memory_bytes={2 * 13 * 4 * packed_length(WIDTH)}) or Schedule(rotate=3)" in said
    assert tight_room(places(13, rotate=3), room) is None
