"""How far drawn pictures are from real ones, as distributions of features: FID and KID (torch-fidelity's), by
Inception's features where there are weights, or by those of an open_clip model, which is neither FID nor KID.

Real pictures are cut to the square in their middle and made as large as the drawn ones.

The Fréchet distance has a bias that falls with the number of pictures: numbers are compared where that is the
same. Its interval is 1.96 standard deviations of draws of both sets with replacement. The kernel distance,
the square of the MMD of KID's cubic kernel, has none; its interval is the jackknife's, too wide where the two
are hardly apart. Of many pictures so many as `KERNEL_PICTURES` are drawn for it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from builder.errors import InputError
from builder.files import read_file
from builder.stages.latents import centre
from recipes.evaluate.drawings import Drawings
from recipes.evaluate.model import Model, Picture, Vectors, known_as
from recipes.evaluate.results import Metric, Numbers, Result
from recipes.training import of_the_extra

BATCH = 32
DRAWS, KERNEL_PICTURES = 50, 5000


@dataclass(frozen=True)
class Features:
    """`of` RGB pictures, (N, E) float32; and what the distances are called by them."""

    name: str
    of: Callable[[Iterable[Image.Image]], Vectors]
    distance: str
    kernel: str


def inception(weights: Path) -> Features:
    """(N, 2048): Inception V3 as FID's authors have it, with its weights in a file
    (`pt_inception-2015-12-05-6726825d.pth`).

    Raises:
        InputError: the file is none.
    """
    with of_the_extra():
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    hint = "get pt_inception-2015-12-05-6726825d.pth, or give features=MODEL, an open_clip model"
    if not weights.is_file():
        raise InputError(f"inception={weights} is not there: nothing is downloaded", hint)
    data = read_file(weights)
    try:  # a pickle may run code; the extractor reads any, so it gets one of tensors alone
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        clean = io.BytesIO()
        torch.save(tensors, clean)
        clean.seek(0)
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=clean
        )
    except Exception as error:
        reason = f"inception={weights} holds no weights of Inception: {str(error).partition(chr(10))[0]}"
        raise InputError(reason, hint) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = net.to(device)

    def features(images: Iterable[Image.Image]) -> Vectors:
        found = [np.empty((0, 2048), np.float32)]
        waiting = iter(images)
        while some := [np.array(image) for image in islice(waiting, BATCH)]:
            batch = torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2).to(device)
            found.append(net(batch)[0].cpu().numpy())
        return np.concatenate(found)

    return Features(f"Inception {sha256(data).hexdigest()[:8]}", features, "FID", "KID x 1000")


def of_model(model: Model) -> Features:
    """(N, E): unit vectors of an open_clip model."""

    name = f"{known_as(model.name)}, not Inception"
    return Features(name, model.vectors, "Fréchet distance", "kernel distance x 1000")


def frechet(
    benchmark: str,
    drawings: Drawings,
    real: Sequence[Picture],
    features: Features,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Result:
    """Raises:
    InputError: there are too few pictures.
    """
    if min(len(real), len(drawings.pictures)) < 3:
        raise InputError("a distance of distributions is of three pictures or more", "give more of them")
    with of_the_extra():
        import torch_fidelity  # noqa: F401
    px = next(drawings.images()).width
    content = sha256()

    def squares() -> Iterator[Image.Image]:
        for picture in real:
            data = picture.read()
            content.update(sha256(data).digest())
            yield centre(picture.of(data), px, resample)

    ours_NE, theirs_ME = features.of(drawings.images()), features.of(squares())
    counts = {"pictures": len(ours_NE), "real": len(theirs_ME)}
    kernel = resample.name.lower()
    protocol = f"features of {features.name}, real pictures {content.hexdigest()[:8]} at {px} px, {kernel}"
    found = (
        _frechet(features.distance, ours_NE, theirs_ME), _kernel(features.kernel, ours_NE, theirs_ME),
    )  # fmt: skip
    return Result(
        benchmark, f"{protocol}; {drawings.how}", drawings.name, counts, found, main=features.distance
    )


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
    chance = np.random.Generator(np.random.PCG64(len(ours_NE)))
    draws = [
        distance(*(one[chance.integers(0, len(one), len(one))] for one in (ours_NE, theirs_ME)))
        for _ in range(DRAWS)
    ]
    half = 1.96 * float(np.std(draws))
    return Metric(name, value, value - half, value + half, [], [])


def _kernel(name: str, ours_NE: Vectors, theirs_ME: Vectors) -> Metric:
    """A thousand times it, as it is told."""
    from torch_fidelity.metric_kid import kernel_poly

    chance = np.random.Generator(np.random.PCG64(len(ours_NE)))
    x, y = (
        (one if len(one) <= KERNEL_PICTURES else one[chance.permutation(len(one))[:KERNEL_PICTURES]])
        for one in (ours_NE.astype(np.float64), theirs_ME.astype(np.float64))
    )

    def kernel(a: Numbers, b: Numbers) -> Numbers:
        cubic = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
        return kernel_poly(a, b, **cubic)

    k_xx, k_yy, k_xy = kernel(x, x), kernel(y, y), kernel(x, y)
    of_x, of_y = (k.sum(1) - np.diag(k) for k in (k_xx, k_yy))
    n, m = len(x), len(y)
    within_x, within_y, across = of_x.sum(), of_y.sum(), k_xy.sum()
    value = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)
    without_x = (within_x - 2 * of_x) / ((n - 1) * (n - 2)) - 2 * (across - k_xy.sum(1)) / ((n - 1) * m)
    without_y = (within_y - 2 * of_y) / ((m - 1) * (m - 2)) - 2 * (across - k_xy.sum(0)) / ((m - 1) * n)
    half = 1.96 * np.sqrt((n - 1) * without_x.var() + (m - 1) * without_y.var())
    value, half = 1000 * float(value), 1000 * float(half)
    return Metric(name, value, value - half, value + half, [], [])
