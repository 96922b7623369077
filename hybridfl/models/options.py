"""Keys that every model node may have, a user's too, and that the program handles itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from hybridfl.build import PositiveFloat, call
from hybridfl.data.dataset import Dataset
from hybridfl.errors import ConfigError

BatchNormPolicy = Literal["average", "local", "reestimate", "batch", "frozen"]
ReestimateOn = Literal["own", "server", "all"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE_MEAN = (123.68, 116.779, 103.939)


@dataclass(frozen=True)
class InputScale:
    """A net is fed ``(x - mean) / std``: one number for each channel, in units of the raw values of ``x``."""

    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]


NAMED = {
    "imagenet": InputScale(tuple(255 * m for m in IMAGENET_MEAN), tuple(255 * s for s in IMAGENET_STD)),
    "imagenet_bytes": InputScale(CAFFE_MEAN, (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class ModelOptions:
    """Options of any model; a net whose own arguments have these names never gets them.

    Attributes:
        batch_norm: what becomes of BatchNorm layers, see :mod:`hybridfl.models.batch_norm`: ``average`` treats their
            parameters and running statistics as any other tensor; ``local`` keeps both with each client (FedBN, Li et al.
            2021, arXiv 2102.07623); ``reestimate`` computes the running statistics anew before a model is scored;
            ``batch`` has none and uses those of the batch always; ``frozen`` never changes those of ``start``.
        reestimate_on: whose examples ``reestimate`` reads: the participant's own, the server's, or everybody's.
        input: how images are standardised: ``dataset`` by the data set's mean and deviation; for pretrained nets
            ``imagenet`` (mean .485 .456 .406 and deviation .229 .224 .225 of values from 0 to 1) or ``imagenet_bytes``
            (123.68, 116.779, 103.939 taken from values from 0 to 255, no deviation), in the order red, green, blue; or
            a mean and deviation of one's own.
    """

    batch_norm: BatchNormPolicy = "average"
    reestimate_on: ReestimateOn = "own"
    input: Literal["dataset", "imagenet", "imagenet_bytes"] | InputScale = "dataset"

    def scale(self, dataset: Dataset) -> InputScale:
        """Mean and deviation for the images of a data set.

        Raises:
            ConfigError: key ``model.input``: a scale of coloured images for others, or not a number for each channel.
        """
        if self.input == "dataset":
            return InputScale(dataset.mean, dataset.std)
        x = dataset.train.x
        if isinstance(self.input, InputScale):
            for name, values in (("mean", self.input.mean), ("std", self.input.std)):
                if len(values) != x.shape[1]:
                    problem = f"got {len(values)} numbers: {dataset.name} has {x.shape[1]} channels; expected as many."
                    raise ConfigError(f"model.input.{name}", problem)
            return self.input
        if x.dtype != np.uint8 or x.shape[1] != 3:
            kind = f"{dataset.name} has {x.shape[1]} of {x.dtype}"
            problem = f"got {self.input}, which is for 3 channels of uint8, but {kind}; nearest valid choice: dataset."
            raise ConfigError("model.input", problem)
        return NAMED[self.input]


RESERVED = frozenset(field.name for field in fields(ModelOptions))


def separated(node: Mapping[str, Any]) -> tuple[ModelOptions, dict[str, Any]]:
    """The program's own options in a model node, and the node without them.

    Raises:
        ConfigError: an option is wrong, under ``model``.
    """
    own = {key: value for key, value in node.items() if key in RESERVED}
    options: ModelOptions = call(ModelOptions, own, "model", {})
    return options, {key: value for key, value in node.items() if key not in RESERVED}
