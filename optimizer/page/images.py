"""The section of the page that shows what a model draws: before and after, for the same inputs."""

from __future__ import annotations

from base64 import b64encode

from edgewise.optimizer.page.blocks import Images, Picture, Section, lines, section
from edgewise.optimizer.pictures import Pictures


def images_section(pictures: Pictures | None) -> tuple[Section, ...]:
    """Grids of images side by side, and how alike they are in words."""
    if pictures is None:
        return ()
    shown = Images(
        tuple(
            Picture(when, f"{pictures.shown} images of the {which}", b64encode(png).decode())
            for when, which, png in (
                ("before", "input model", pictures.before),
                ("after", "model that was written", pictures.after),
            )
        )
    )
    words = [f"{finding}." for finding in pictures.findings]
    return section(
        "images", "What it draws", shown, lines(["Both models drew from the same inputs.", *words])
    )
