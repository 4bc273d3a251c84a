"""The two LeNets that pruning papers measure on MNIST."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify_deploy.models._initialise import initialise_


class LeNet300100(nn.Module):
    """Two hidden layers of 300 and 100 ReLU units; 266,610 parameters for 28x28 inputs and ten classes.

    `(B, C, H, W)` or any other shape of C·H·W values is flattened here. Weights start Glorot-normal (Glorot & Bengio
    2010) and biases at 0, because with torch's own initialisation of Linear layers magnitude pruning to 2 % empties
    the first layer, an accident of the different scales of its layers rather than a property of the criterion.
    """

    def __init__(self, *, in_channels: int, image_size: int, classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels * image_size**2, 300)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(300, 100)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(100, classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, classes)`."""
        x = torch.flatten(x, 1)
        x = self.relu1(self.fc1(x))
        x = self.relu2(self.fc2(x))
        return self.fc3(x)  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """Caffe's variant: 20 and 50 5x5 convolutions, each max-pooled, then 500 units; 431,080 parameters on MNIST.

    As in Caffe's `lenet_train_test.prototxt` the only ReLU follows the first fully connected layer. Convolutions
    start Kaiming-normal, linear layers Glorot-normal, biases at 0.
    """

    def __init__(self, *, in_channels: int, image_size: int, classes: int) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * side**2, 500)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(500, classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, classes)` of images `(B, in_channels, image_size, image_size)`."""
        x = self.pool1(self.conv1(x))
        x = self.pool2(self.conv2(x))
        x = self.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)  # type: ignore[no-any-return]
