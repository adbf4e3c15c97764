"""Receives that are posted ahead of their round, without a network."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lc3.errors import ExchangeError
from lc3.transport.group import Pairwise


class Done:
    """What has been sent or received."""

    def wait(self) -> None:
        """Return at once."""


class Mirror(Pairwise):
    """Two ranks, of which the other sends back what it gets, until it is gone."""

    def __init__(self, ahead: int) -> None:
        super().__init__([0, 1], 0, ahead)
        self.posted: list[Tensor] = []
        self.waiting: list[int] = []  # receives posted when a message was sent
        self.gone = False

    def _receive(self, buffer: Tensor, peer: int, part: int) -> Any:
        if self.gone:
            raise RuntimeError("Connection closed by peer")
        self.posted.append(buffer)
        return Done()

    def _send(self, data: Tensor, peer: int, part: int) -> Any:
        self.waiting.append(len(self.posted))
        self.posted.pop(0)[: data.numel()] = data
        return Done()


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_receives_wait_for_as_many_rounds_as_are_said(ahead: int) -> None:
    transport = Mirror(ahead)
    for number in range(6):
        message = torch.full((5,), number, dtype=torch.uint8)
        assert torch.equal(transport.all_gather(message)[1], message)
    assert transport.waiting == [max(1, ahead)] * 6


def test_a_peer_that_closes_behind_its_last_message_fails_no_round_before() -> None:
    transport = Mirror(2)
    message = torch.ones(5, dtype=torch.uint8)
    transport.all_gather(message)
    transport.gone = True
    for _ in range(2):  # for which receives were posted
        assert torch.equal(transport.all_gather(message)[1], message)
    with pytest.raises(ExchangeError, match="Connection closed by peer"):
        transport.all_gather(message)
