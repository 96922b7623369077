"""PACS: seven classes as photo, art painting, cartoon and sketch. Li, Yang, Song, Hospedales 2017, arXiv 1710.03077."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hybridfl.data.image_folder import ImageFolder


@dataclass(frozen=True)
class PACS(ImageFolder):
    """An image folder of domains; the arguments are those of :class:`~hybridfl.data.image_folder.ImageFolder`."""

    licence: ClassVar[str] = "none stated; cite Li et al. 2017"
    by_hand: ClassVar[str] = (
        "Its images, for each of four domains a folder for each class, are linked from domaingeneralization.github.io, but "
        "from no address that lasts."
    )

    folder: str = "pacs"
    first_level: Literal["class", "domain"] = "domain"
