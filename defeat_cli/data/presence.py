"""Which of the images that annotations name are there, one file each, and of what size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from defeat_cli.data.annotations import Annotations
from defeat_cli.data.faults import Fault, Faults, ImageError
from defeat_cli.data.images import leaves
from defeat_cli.data.transforms import image_size
from defeat_cli.text import listed, out_of


def present(annotations: Annotations, images: Path, faults: Faults) -> Annotations:
    """The annotations of images that are there, with all their sizes.

    Args:
        images: folder that file names are relative to.
        faults: is told of the others.

    Raises:
        DataError: a fault that is not tolerated.
    """
    names = annotations.file_names
    outside = [i for i, name in enumerate(names) if leaves(name, images)]
    faults.tell(
        [
            Fault("climbs", f"{annotations.origin}: image {names[i]!r} lies outside of {images}; only its own are read")
            for i in outside
        ]
    )
    missing = sorted(set(_missing(names, images)) - set(outside))
    absent = f"{out_of(len(missing), len(names), 'image', 'is', 'are')} not in {images}"
    faults.tell(
        [Fault("missing", f"{images / names[i]}: is not there", images / names[i]) for i in missing],
        f"{annotations.origin}: {absent}: {listed([names[i] for i in missing], 3)}",
    )
    repeated = _tell_repeated(annotations, faults)
    sizes, unread = [], []
    gone = {*outside, *missing, *repeated}
    for i, (name, size) in enumerate(zip(names, annotations.sizes, strict=True)):
        try:
            sizes.append(size or (None if i in gone else image_size(images / name)))
        except ImageError as error:
            sizes.append(None)
            unread.append(i)
            faults.tell(Fault(error.rule, str(error), images / name))
    return annotations.with_sizes(sizes).without_images(sorted(gone.union(unread)))


def _missing(names: Sequence[str], images: Path) -> list[int]:
    """One listing a folder, not one question a file: there may be 100,000 of them on a network disk."""
    listings = {}
    for parent in {os.path.dirname(name) for name in names}:
        try:
            listings[parent] = set(os.listdir(images / parent))
        except (OSError, ValueError):
            listings[parent] = set()
    return [i for i, name in enumerate(names) if os.path.basename(name) not in listings[os.path.dirname(name)]]


def _tell_repeated(annotations: Annotations, faults: Faults) -> list[int]:
    places: dict[str, int] = {}
    repeated = []
    for i, name in enumerate(annotations.file_names):
        first = places.setdefault(os.path.normpath(name), i)
        if first != i:
            repeated.append(i)
            ids = annotations.image_ids
            text = f"image {name} is listed twice, with ids {ids[first]!r} and {ids[i]!r}; put its boxes under one id"
            faults.tell(Fault("listed twice", f"{annotations.origin}: {text}"))
    return repeated
