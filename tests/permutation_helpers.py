"""Small nets of every kind whose hidden units can be permuted, and models of them in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.models.cnn import CNN
from hybridfl.models.mlp import MLP
from hybridfl.params import clone
from hybridfl.types import Model

torch.set_num_threads(1)  # several threads on a shared machine are slower


class Block(nn.Module):
    """Torchvision's basic block; its ReLU module runs twice."""

    def __init__(self, narrow: int, wide: int, stride: int, shortcut: str, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)
        self.norm1 = norm(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.norm2 = norm(wide)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        self.stride, self.extra = stride, wide - narrow
        if self.extra and shortcut == "B":
            self.shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), norm(wide))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        identity = self.shortcut(x)
        if identity.shape != out.shape:
            half = self.extra // 2
            identity = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet for small images, He et al. 2016: a stem and stages of basic blocks."""

    def __init__(
        self,
        blocks: tuple[int, ...] = (2, 2),
        width: int = 4,
        shortcut: str = "B",
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        pool: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm1 = norm(width)
        stages: list[nn.Module] = []
        narrow = width
        for s, number in enumerate(blocks):
            wide = width * 2**s
            chain = []
            for b in range(number):
                chain.append(Block(narrow, wide, 2 if s and not b else 1, shortcut, norm))
                narrow = wide
            stages.append(nn.Sequential(*chain))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1) if pool else None
        self.head = nn.Linear(narrow, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.norm1(self.conv1(x))))
        x = torch.flatten(self.pool(x), 1) if self.pool else x.mean((2, 3))
        logits: Tensor = self.head(x)
        return logits


class Fire(nn.Module):
    """SqueezeNet's module: two convolutions side by side."""

    def __init__(self, channels: int, squeeze: int, one: int, three: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.one = nn.Conv2d(squeeze, one, 1)
        self.three = nn.Conv2d(squeeze, three, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class Gate(nn.Module):
    """Squeeze and excitation, Hu et al. 2018."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, 3), nn.Linear(3, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3))))))
        return x * gate.view(x.size(0), -1, 1, 1)


class Scaled(nn.Module):
    """A residual branch with LayerScale, on vectors under LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.gamma = nn.LayerNorm(width), nn.Parameter(torch.ones(width))
        self.inner, self.outer = nn.Linear(width, 7), nn.Linear(7, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.outer(F.gelu(self.inner(self.norm(x))))


class PositionGate(nn.Module):
    """One number for every position, for all channels alike."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.look(x))


class Odd(nn.Module):
    """A gated linear unit, thirds of which one is normalised and one a softmax, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.turn, self.head = nn.Linear(192, 24), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        gated, gate = self.embed(x.flatten(1)).chunk(2, 1)
        x = gated * gate.sigmoid()
        x = torch.cat([F.layer_norm(x[:, :4], (4,)), F.softmax(x[:, 4:8], 1), x[:, 8:]], 1)
        return self.head(F.relu(self.turn(F.relu(self.turn(x)))))


class Padded(nn.Module):
    """Constant channels that a norm makes features of, constants around positions, and a pooling that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x))
        side = (len(x), 1, *x.shape[2:])
        x = torch.cat([x.new_zeros(side), x, torch.zeros(side, dtype=x.dtype)], 1)
        x = self.conv2(F.pad(F.relu(self.norm(x)), (1, 1, 1, 1)))
        return self.head(F.pad(self.pool(F.relu(x + 1)), (0, 1)).mean((2, 3)))


def plain(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"),
        norm(6),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3),
        norm(8),
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Linear(8 * 4, 9),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(9, 5),
        nn.LogSoftmax(dim=1),
    )


def mobile() -> nn.Module:
    """Depthwise convolutions, the second with two outputs a channel."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.PReLU(6),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 12, 3, groups=6),
        nn.Conv2d(12, 8, 1),
        nn.Hardswish(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def squeeze() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), Fire(8, 4, 4, 5), nn.Conv2d(9, 5, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip


def gated() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), Gate(6), PositionGate(6), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 16, 8), Scaled(8), Scaled(8), nn.Linear(8, 5),
    )  # fmt: skip


def in_groups(number: int) -> Callable[[int], nn.Module]:
    return lambda channels: nn.GroupNorm(number, channels)


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP((3, 8, 8), 5, (7, 6)),
    "cnn": lambda: CNN((3, 8, 8), 5, (4, 8), 9, groups=2),
    "cnn, one channel a group": lambda: CNN((3, 8, 8), 5, (4, 8), 9, groups=4),
    "plain, batch norm": lambda: plain(nn.BatchNorm2d),
    "plain, layer norm": lambda: plain(in_groups(1)),
    "plain, group norm": lambda: plain(in_groups(2)),
    "plain, instance norm": lambda: plain(lambda c: nn.InstanceNorm2d(c, affine=True)),
    "resnet B": lambda: ResNet(),
    "resnet A": lambda: ResNet(shortcut="A"),
    "resnet, group norm": lambda: ResNet(norm=in_groups(2), pool=False),
    "resnet A, group norm": lambda: ResNet(shortcut="A", norm=in_groups(2)),
    "mobile": mobile,
    "squeeze": squeeze,
    "gated": gated,
    "odd": Odd,
    "padded": Padded,
}


def inputs(seed: int = 0, number: int = 40) -> Tensor:
    return torch.randn(number, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def model(net: nn.Module, seed: int = 0) -> Model:
    """Weights in float64 in which no two units are alike, norms and their statistics too."""
    random = torch.Generator().manual_seed(seed)
    net = copy.deepcopy(net).double()
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.dim() > 1:
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=random)
        elif name.endswith("running_var") or "weight" in name:
            tensor.uniform_(0.5, 1.5, generator=random)
        else:
            tensor.normal_(std=0.2, generator=random)
    return Model(clone(dict(net.named_parameters())), clone(dict(net.named_buffers())))


def run(net: nn.Module, of: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(copy.deepcopy(net).eval(), {**of.params, **of.buffers}, (x,))
