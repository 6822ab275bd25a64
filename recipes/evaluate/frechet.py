"""How far drawn pictures are from real ones, as distributions of features: FID and KID (torch-fidelity's), by
Inception's features where there are weights, or by those of an open_clip model, which is not FID.

Real pictures are cut to the square in their middle and made as large as the drawn ones.

The Fréchet distance has a bias that falls with the number of pictures: numbers are compared where that is the
same. Its interval is of draws of both sets with replacement, moved to the value, for draws add to the bias.
KID has none; its value is the mean over random subsets, its interval the middle 95 % of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from builder.errors import InputError
from builder.files import sha256_file
from recipes.evaluate.drawings import Drawings
from recipes.evaluate.model import Model, Picture, Vectors
from recipes.evaluate.results import Metric, Result
from recipes.training import of_the_extra

BATCH = 32
FRECHET_DRAWS = 20
SUBSETS, SUBSET = 100, 1000  # of KID, the usual
Features = Callable[[Iterable[Image.Image]], Vectors]


def inception(weights: Path) -> tuple[str, Features]:
    """A name, and what gives (N, 2048): Inception V3 as FID's authors have it, with its weights in a file
    (`pt_inception-2015-12-05-6726825d.pth`).

    Raises:
        InputError: the file is none.
    """
    with of_the_extra():
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    hint = "get pt_inception-2015-12-05-6726825d.pth, or give features=MODEL, an open_clip model"
    if not weights.is_file():
        raise InputError(f"inception={weights} is not there: nothing is downloaded", hint)
    try:
        torch.load(weights, weights_only=True)  # it may be anybody's, and the extractor reads any pickle
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        )
    except Exception as error:
        reason = f"inception={weights} holds no weights of Inception: {str(error).partition(chr(10))[0]}"
        raise InputError(reason, hint) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = net.to(device)

    def features(images: Iterable[Image.Image]) -> Vectors:
        found = [np.empty((0, 2048), np.float32)]
        waiting = iter(images)
        while some := [np.asarray(image) for image in islice(waiting, BATCH)]:
            batch = torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2).to(device)
            found.append(net(batch)[0].cpu().numpy())
        return np.concatenate(found)

    return f"Inception {sha256_file(weights)[:8]}", features


def of_model(model: Model) -> tuple[str, Features]:
    """A name, and what gives (N, E): unit vectors of an open_clip model."""

    def features(images: Iterable[Image.Image]) -> Vectors:
        return model.images(Picture(str(n), _png(image)) for n, image in enumerate(images))[0]

    return f"{model.name}, not Inception", features


def frechet(
    benchmark: str, drawings: Drawings, real: Sequence[Picture], named: tuple[str, Features]
) -> Result:
    """Raises:
    InputError: there are too few pictures.
    """
    if min(len(real), len(drawings.pictures)) < 2:
        raise InputError("a distance of distributions is of two pictures or more", "give more of them")
    name, features = named
    px = next(drawings.images()).width
    ours_NE = features(drawings.images())
    theirs_ME = features(square(picture.of(picture.read()), px) for picture in real)
    short = "FID" if name.startswith("Inception") else "Fréchet distance"
    counts = {"pictures": len(ours_NE), "real": len(theirs_ME)}
    protocol = f"features of {name}, {px} px; {drawings.how}"
    found = (_frechet(short, ours_NE, theirs_ME), _kid("KID", ours_NE, theirs_ME))
    return Result(benchmark, protocol, str(drawings.folder), counts, found)


def _frechet(name: str, ours_NE: Vectors, theirs_ME: Vectors) -> Metric:
    from torch_fidelity.metric_fid import (
        KEY_METRIC_FID,
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )

    def distance(ours: Vectors, theirs: Vectors) -> float:
        both = (
            fid_features_to_statistics(torch.from_numpy(one.astype(np.float64))) for one in (ours, theirs)
        )
        return float(fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID])

    value = distance(ours_NE, theirs_ME)
    draws = [
        distance(ours_NE[ours], theirs_ME[theirs])
        for ours, theirs in _draws(len(ours_NE), len(theirs_ME), FRECHET_DRAWS)
    ]
    low, high = np.percentile(np.array(draws) - np.mean(draws) + value, [2.5, 97.5])
    return Metric(name, value, float(low), float(high), [], [])


def _kid(name: str, ours_NE: Vectors, theirs_ME: Vectors) -> Metric:
    """A thousand times it, as it is told."""
    from torch_fidelity.metric_kid import kernel_mmd

    size = min(SUBSET, len(ours_NE), len(theirs_ME))
    chance = np.random.Generator(np.random.PCG64(size))
    found = []
    for _ in range(SUBSETS):
        ours, theirs = (chance.choice(len(one), size, replace=False) for one in (ours_NE, theirs_ME))
        mmd = kernel_mmd(
            ours_NE[ours].astype(np.float64), theirs_ME[theirs].astype(np.float64), kid_kernel="poly",
            kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1,
        )  # fmt: skip
        found.append(1000 * float(mmd))
    low, high = np.percentile(found, [2.5, 97.5])
    return Metric(f"{name} x 1000", float(np.mean(found)), float(low), float(high), [], [])


def _draws(ours: int, theirs: int, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    chance = np.random.Generator(np.random.PCG64(ours))
    for _ in range(number):
        yield chance.integers(0, ours, ours), chance.integers(0, theirs, theirs)


def square(image: Image.Image, px: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((px, px), Image.Resampling.BICUBIC, box=box)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
