"""Model, data and training of the app."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def datasets(partitions):
    """One training set per client, and a test set."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    sizes = [1500 // partitions] * partitions
    *parts, test = random_split(data, [*sizes, len(data) - sum(sizes)], torch.Generator().manual_seed(0))
    return parts, test


def train(model, data, epochs, lr):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for images, labels in DataLoader(data, batch_size=32, shuffle=True):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return float(loss)


@torch.no_grad()
def accuracy(model, data):
    images, labels = next(iter(DataLoader(data, batch_size=len(data))))
    return float((model(images).argmax(1) == labels).float().mean())
