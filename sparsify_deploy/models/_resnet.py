"""ResNets for small images: 6n+2 layers (He et al. 2015, arXiv 1512.03385, section 4.2), option B shortcuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify_deploy.models._initialise import initialise_


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut; the shortcut is a 1x1 convolution where shapes differ."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` to `(B, channels, H / stride, W / stride)`, rounded up."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu2(x + identity)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A 3x3 stem, three stages of `blocks` blocks with `width`, 2 and 4 times `width` channels, mean, classifier.

    Convolutions start Kaiming-normal, the classifier Glorot-normal, BatchNorm at 1 and 0.
    """

    def __init__(self, *, blocks: int, width: int, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, classes)` of images `(B, in_channels, H, W)`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.pool(x), 1))  # type: ignore[no-any-return]


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    later = [Block(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(in_channels, channels, stride), *later)
