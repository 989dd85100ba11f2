"""Residual networks for small pictures (He et al. 2016, section 4.2), as LDAM, BCL and the released code use them.

depth = 6n + 2: a 3x3 convolution, three stages of n basic blocks with widths w, 2w, 4w, then the mean over the map.
Shortcuts are option A (subsample, pad channels with zeros: no parameters), so ResNet-32 has the field's 0.46 M.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ltfast.models.conv import Conv3x3

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
CIFAR_STRIDES = (1, 2, 2)  # maps of 32, 16, 8 pixels for 32 x 32 pictures; 8, 4, 2 for the 8 x 8 digits
# One halving fewer; not for the digits, whose recipe is made for the strides above.
SMALL_STRIDES = (1, 1, 2)


class BasicBlock(nn.Module):
    """relu(BN(conv(relu(BN(conv(x))))) + shortcut(x)): [B, in, H, W] -> [B, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"out_channels: {out_channels} < in_channels {in_channels}; option A only pads channels")
        self.conv1 = Conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.pad = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """One block; see the class."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every stride-th pixel, new channels zero, half of them in front."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.pad:
            x = F.pad(x, (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        return x


class CifarResNet(nn.Module):
    """ResNet-(6n+2) without its classifier: [B, in_channels, H, W] -> features [B, 4 * width].

    Any picture of at least 4 x 4 pixels works; `strides` are those of the three stages. Raises ValueError.
    """

    def __init__(
        self, depth: int, in_channels: int = 3, width: int = 16, strides: tuple[int, int, int] = CIFAR_STRIDES
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: {depth} is not 6n + 2 (8, 14, 20, 26, 32, ...)")
        if width < 1 or in_channels < 1:
            raise ValueError(f"width, in_channels: ({width}, {in_channels}) must be at least 1")
        blocks = (depth - 2) // 6
        self.feature_dim = 4 * width
        self.conv1 = Conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, strides[0])
        self.layer2 = _stage(width, 2 * width, blocks, strides[1])
        self.layer3 = _stage(2 * width, 4 * width, blocks, strides[2])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, 4 * width] of pictures [B, in_channels, H, W]."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.layer3(self.layer2(self.layer1(out)))
        return out.mean((2, 3))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))
