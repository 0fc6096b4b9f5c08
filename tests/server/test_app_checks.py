"""What the server refuses before the first round."""

import pytest
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from server import app
from tofu.errors import SettingError
from tofu.settings import Settings


class Nodes(InMemoryGrid):  # type: ignore[misc]
    """The grid of a simulation, of which only the nodes are asked."""

    def __init__(self, count: int) -> None:
        self._count = count

    def get_node_ids(self) -> list[int]:
        return list(range(self._count))


def test_a_simulation_with_another_number_of_nodes_than_clients() -> None:
    app._check_clients(Nodes(3), Settings.of({"clients": 3}))
    with pytest.raises(SettingError, match=r"clients=4 .* expected 3, the number of supernodes"):
        app._check_clients(Nodes(3), Settings.of({"clients": 4}))


def test_recorded_clients_of_a_simulation_must_exist() -> None:
    app._check_clients(Nodes(3), Settings.of({"clients": 3, "record-clients": "0,2"}))
    with pytest.raises(SettingError, match=r"record-clients='3' .* 0 to 2"):
        app._check_clients(Nodes(3), Settings.of({"clients": 3, "record-clients": "0,3"}))


def test_a_server_of_real_clients_says_that_it_does_not_use_its_training_images() -> None:
    data = {"read_as": "images", "train": 84, "test": 16, "classes": ["cat", "dog"]}
    assert app._read_note(data, local=True) == "reads images: 84 to train and 16 to test, of the classes cat, dog"
    assert "84 to train (which the server does not use) and 16 to test" in app._read_note(data, local=False)
