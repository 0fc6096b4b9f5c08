import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tofu.data import LabeledImages
from tofu.errors import DataError, SettingError
from tofu.tasks import TaskStream, backward_transfer, mean_accuracy, only_classes


@given(st.integers(1, 30), st.data(), st.integers(0, 100))
def test_classes_are_dealt_to_tasks_each_to_one(classes: int, data: st.DataObject, seed: int) -> None:
    tasks = data.draw(st.integers(1, classes))
    stream = TaskStream("classes", tasks, classes, seed)
    dealt = [stream.classes_of(task) for task in range(tasks)]
    assert sorted(c for own in dealt for c in own) == list(range(classes))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_a_class_task_has_its_classes_images_and_keeps_their_labels(digits: LabeledImages) -> None:
    stream = TaskStream("classes", 5, 10, seed=3)
    parts = [stream.images_of(digits, task) for task in range(5)]
    assert sum(map(len, parts)) == len(digits)
    for task, part in enumerate(parts):
        assert tuple(part.labels.unique().tolist()) == stream.classes_of(task)
        assert part.classes == 10
    with pytest.raises(DataError, match="there is no image of task 1, whose classes are"):
        stream.images_of(parts[0], 1)


def test_a_pixel_task_is_a_permutation_that_the_seed_fixes(digits: LabeledImages) -> None:
    stream = TaskStream("pixels", 3, 10, seed=1)
    first, second = (stream.images_of(digits, task) for task in (0, 1))
    assert torch.equal(first.images, digits.images)
    assert not torch.equal(second.images, digits.images)
    assert torch.equal(second.images.flatten(1).sort().values, digits.images.flatten(1).sort().values)
    assert torch.equal(second.labels, digits.labels)
    back = stream.permutation_of(1, 64).argsort()
    assert torch.equal(second.images.flatten(1)[:, back], digits.images.flatten(1))
    assert torch.equal(TaskStream("pixels", 3, 10, seed=1).images_of(digits, 1).images, second.images)
    assert not torch.equal(TaskStream("pixels", 3, 10, seed=2).images_of(digits, 1).images, second.images)
    assert not torch.equal(stream.images_of(digits, 2).images, second.images)


def test_colors_move_together() -> None:
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(0, 256, (2, 1, 4, 4), generator=generator, dtype=torch.uint8)
    data = LabeledImages(grey.expand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), 1)
    permuted = TaskStream("pixels", 2, 1).images_of(data, 1).images
    assert torch.equal(permuted[:, 0], permuted[:, 2])


@given(st.integers(1, 20), st.text(max_size=3), st.integers(0, 9))
def test_a_clients_own_order_has_every_task_once(tasks: int, client: str, seed: int) -> None:
    own = TaskStream("pixels", tasks, 10, seed, "own")
    assert sorted(own.number(i, client) for i in range(tasks)) == list(range(tasks))
    assert [TaskStream("pixels", tasks, 10, seed).number(i, client) for i in range(tasks)] == list(range(tasks))


def test_clients_orders_differ() -> None:
    stream = TaskStream("pixels", 8, 10, order="own")
    orders = {tuple(stream.number(i, str(client)) for i in range(8)) for client in range(6)}
    assert len(orders) == 6


def test_a_stream_of_kind_none_repeats_the_data(digits: LabeledImages) -> None:
    stream = TaskStream("none", 2, 10)
    assert torch.equal(stream.images_of(digits, 1).images, digits.images)
    assert stream.classes_of(1) == tuple(range(10))


@pytest.mark.parametrize(
    ("kind", "tasks", "order", "message"),
    [
        ("words", 2, "same", "tasks='words' is not usable: expected one of none, classes, pixels"),
        ("pixels", 2, "any", "task-order='any' is not usable: expected one of same, own"),
        ("pixels", 0, "same", "task-count=0 is not usable: expected 1 to 10000"),
        ("classes", 11, "same", "task-count=11 is not usable: expected 1 to 10, the number of classes"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(kind: str, tasks: int, order: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TaskStream(kind, tasks, 10, order=order)


def test_there_is_no_task_beyond_the_last() -> None:
    with pytest.raises(ValueError, match="task 2 is not usable: expected 0 to 1"):
        TaskStream("pixels", 2, 10).permutation_of(2, 64)


def test_a_masked_head_learns_only_its_tasks_rows() -> None:
    model = nn.Linear(4, 6)
    x, labels = torch.ones(2, 4), torch.tensor([1, 3])
    with only_classes(model, (3, 1)):
        logits = model(x)
        loss = F.cross_entropy(logits, labels)
        soft = F.cross_entropy(logits, F.one_hot(labels, 6).float())
        loss.backward()
    assert torch.allclose(loss, soft)
    assert torch.allclose(loss, F.cross_entropy(model(x)[:, [1, 3]], torch.tensor([0, 1])))
    assert model.weight.grad is not None
    assert model.weight.grad[[0, 2, 4, 5]].abs().max() == 0
    assert model.weight.grad[[1, 3]].abs().min() > 0
    assert set(logits.argmax(1).tolist()) <= {1, 3}
    assert model(x).min() > -1e6  # the mask is gone


def test_what_was_learnt_and_forgotten_of_a_matrix_by_hand() -> None:
    matrix = torch.tensor([[0.9, 0.0, 0.0], [0.8, 0.7, 0.0], [0.6, 0.75, 0.5]])
    assert mean_accuracy(matrix) == pytest.approx(100 * (0.6 + 0.75 + 0.5) / 3)
    assert backward_transfer(matrix) == pytest.approx(100 * ((0.6 - 0.9) + (0.75 - 0.7)) / 2)
    assert backward_transfer(matrix[:1, :1]) == 0
