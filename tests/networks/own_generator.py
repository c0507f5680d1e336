"""Generators of one's own: three small ones, and the line that makes each known."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mmsr.core import Settings
from mmsr.networks.generators import G1, Stage
from mmsr.networks.layers import Convolution, ResidualBlock
from mmsr.networks.weights import GENERATORS


class OwnSettings(Settings):
    """What decides the architecture."""

    kind: Literal["own", "silent", "zeros"] = "own"
    scale: int = 8
    channels: int = 8


class Own(G1):
    """Convolve, normalise the whole slice, and shuffle to the fine grid."""

    settings_class = OwnSettings

    def __init__(self, settings: OwnSettings) -> None:
        super().__init__()
        self.settings = settings
        self.head = self.first()
        self.block = ResidualBlock(settings.channels, "instance")
        self.last = Convolution(settings.channels, settings.scale**2, 3)

    def first(self) -> nn.Module:
        """Give the first layer."""
        return Convolution(1, self.settings.channels, 5)

    @property
    def min_size(self) -> int:
        """Shortest side of a patch: the mirror of a 5×5 kernel."""
        return 3

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        features = F.leaky_relu(self.block(self.head(x)), 0.2)
        return F.pixel_shuffle(self.last(features), self.scale).tanh()

    def stages(self) -> Sequence[Stage] | None:
        """List what `forward` does."""
        shuffle = nn.PixelShuffle(self.scale)
        return [self.head, self.block, nn.LeakyReLU(0.2), self.last, shuffle, nn.Tanh()]


class Silent(Own):
    """Do the same, and do not say how."""

    def stages(self) -> Sequence[Stage] | None:
        """Tell nothing."""
        return None


class Zeros(Own):
    """Pad with zeros, which tiling does not know."""

    def first(self) -> nn.Module:
        """Give the first layer."""
        return nn.Conv2d(1, self.settings.channels, 5, padding=2)


GENERATORS.update(own=Own, silent=Silent, zeros=Zeros)
