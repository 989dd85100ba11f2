"""The 3x3 convolution of small networks, which may run through ltfast's own kernel."""

import torch
from torch import Tensor, nn

from ltfast.errors import UserError
from ltfast.kernels.conv import CHANNELS, HALVES, conv3x3


class Conv3x3(nn.Conv2d):
    """nn.Conv2d(in, out, 3, stride, padding=1, bias=False), parameters and results alike.

    Attributes:
        own_kernel: 16-bit pictures go through `ltfast.kernels.conv.conv3x3`; set by `use_own_kernels`.
    """

    own_kernel = False

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride]."""
        if self.own_kernel:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            if dtype in HALVES:
                return conv3x3(x.to(dtype), self.weight)
        return super().forward(x)


def use_own_kernels(model: nn.Module) -> None:
    """Let every convolution that ltfast's kernel can do go through it.

    Raises:
        UserError: there is none.
    """
    layers = [m for m in model.modules() if isinstance(m, Conv3x3) and m.stride == (1, 1)]
    layers = [m for m in layers if m.in_channels in CHANNELS and m.out_channels in CHANNELS]
    if not layers:
        raise UserError(
            f"--convolutions kernel: the model has no 3x3 convolution of {CHANNELS[0]} or {CHANNELS[1]} channels, as a "
            "resnet32 has; use --convolutions library"
        )
    for layer in layers:
        layer.own_kernel = True
