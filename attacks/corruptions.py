"""The fifteen common corruptions of CIFAR-10-C at five severities, for images of any small size, grey or coloured.

Source of kinds and constants: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations", ICLR 2019, and their script `make_cifar_c.py` (Apache-2.0), written anew here from its parameters.
No kept library fits: `imagecorruptions` (last release 2020) does not run beside today's scikit-image; its maintained
fork `imagecorruptions-imaug` and `corrupt-tta` have ImageNet's far stronger severities, refuse images below 32 pixels
or bring OpenCV, numba and scikit-image, and draw from NumPy's global generator; kornia and Albumentations have some of
the fifteen, with other parameters.

What differs from the published script, and why:

* values are rounded to the nearest of 256 levels, as all our images are, where the script cuts them off;
* lengths are those published for 32 x 32 pixels and stay the same for other sizes, but for `elastic_transform`, whose
  lengths are shares of the image's side there too;
* `frost` mixes in a streaked random texture instead of photographs, which are not ours to ship; it has the colours, the
  contrast and the spectrum of the five published photographs (ResNet-20's errors on CIFAR-10 with it: 15, 23, 33, 36
  and 48 %; with the photographs: 16, 23, 34, 36 and 46 %; 500 test images, 11 % without);
* `glass_blur` copies a neighbour's pixel over another, which is what the script's swap of NumPy's views comes to.

Each image has its own generator: what becomes of it depends on its pixels, the corruption and its seed alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter, map_coordinates, zoom

from detector.errors import RequestError
from detector.images import Pixels

Picture = npt.NDArray[np.float64]  # one image in [0, 1], `(height, width, channels)`, channels 1 or 3
SEVERITIES = (1, 2, 3, 4, 5)
LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)


@dataclass(frozen=True, slots=True)
class Corruption:
    """One kind of damage.

    Attributes:
        name: as published.
        apply: image, generator and the numbers of a severity -> image, not yet clipped to [0, 1].
        constants: those numbers, one entry for each severity from 1 to 5.
    """

    name: str
    apply: Callable[..., Picture]
    constants: tuple[tuple[float, ...], ...]

    def __call__(self, pixels: Pixels, severity: int, seeds: Sequence[int]) -> Pixels:
        """Damaged copies of images, rounded to 8 bits.

        Args:
            pixels: `uint8`, `(images, height, width, channels)`, 1 or 3 channels.
            severity: from 1 to 5.
            seeds: of each image's random draws.

        Raises:
            RequestError: the severity is not from 1 to 5, or the images have neither 1 nor 3 channels.
        """
        if severity not in SEVERITIES:
            raise RequestError(f"expected a severity from 1 to 5, got {severity}")
        if pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or pixels.dtype != np.uint8:
            raise RequestError(
                f"expected uint8 pixels (images, height, width, 1 or 3), got {pixels.dtype} {pixels.shape}"
            )
        numbers = self.constants[severity - 1]
        damaged = np.empty_like(pixels)
        for place, (image, seed) in enumerate(zip(pixels, seeds, strict=True)):
            result = self.apply(image / 255.0, np.random.default_rng(seed), *numbers)
            damaged[place] = np.round(np.clip(result, 0, 1) * 255)
        return damaged


def gaussian_noise(image: Picture, rng: np.random.Generator, spread: float) -> Picture:
    """Normal noise of standard deviation `spread`, each value on its own."""
    return image + rng.normal(0, spread, image.shape)


def shot_noise(image: Picture, rng: np.random.Generator, photons: float) -> Picture:
    """Each value is a count of `photons` times as many light quanta as it should have."""
    return rng.poisson(image * photons) / photons


def impulse_noise(image: Picture, rng: np.random.Generator, share: float) -> Picture:
    """A `share` of all values becomes 0 or 1, by a fair coin."""
    hit, salt = rng.random(image.shape) < share, rng.random(image.shape) < 0.5
    return np.where(hit, salt.astype(np.float64), image)


def defocus_blur(image: Picture, _rng: np.random.Generator, radius: float, softness: float) -> Picture:
    """Each point becomes a disc of `radius` pixels with an edge softened by `softness` pixels."""
    reach = math.ceil(radius) + 1
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    soft = np.exp(-0.5 * (np.arange(-1, 2) / softness) ** 2)
    soft /= soft.sum()
    kernel = convolve(disc / disc.sum(), np.outer(soft, soft), mode="constant")
    return np.asarray(convolve(image, kernel[:, :, None], mode="mirror"), np.float64)


def glass_blur(image: Picture, rng: np.random.Generator, spread: float, reach: float, rounds: float) -> Picture:
    """Blurred, each pixel replaced by one that lies up to `reach` up or left of it, `rounds` times, blurred again."""
    height, width, _ = image.shape
    delta = int(reach)
    shuffled = _blurred(image, spread)
    for _ in range(int(rounds)):
        # Row by row from the end, as published: a copied pixel may be copied on.
        for row in range(height - delta, delta, -1):
            shifts = rng.integers(-delta, delta, (width, 2))
            for column in range(width - delta, delta, -1):
                down, right = shifts[column]
                shuffled[row, column] = shuffled[row + down, column + right]
    return _blurred(shuffled, spread)


def motion_blur(image: Picture, rng: np.random.Generator, radius: float, spread: float) -> Picture:
    """Dragged along a random direction within 45 degrees of the horizontal."""
    return _dragged(image, radius, spread, rng.uniform(-45, 45))


def zoom_blur(image: Picture, _rng: np.random.Generator, largest: float) -> Picture:
    """The mean of the image and of its enlargements about the centre by 1.00, 1.01, ... to `largest`."""
    factors = np.arange(1, largest, 0.01)
    return (image + sum(_zoomed(image, factor) for factor in factors)) / (len(factors) + 1)


def snow(
    image: Picture, rng: np.random.Generator, mean: float, spread: float, scale: float, level: float, radius: float,
    drag: float, keep: float,
) -> Picture:  # fmt: skip
    """Flakes (enlarged noise above a `level`, dragged downwards) over a paler image, of which `keep` stays."""
    noise = _zoomed(rng.normal(mean, spread, (*image.shape[:2], 1)), scale)
    flakes = np.where(noise < level, 0, np.clip(noise, 0, 1))
    flakes = _dragged(flakes, radius, drag, rng.uniform(-135, -45))
    paler = keep * image + (1 - keep) * np.maximum(image, _grey(image) * 1.5 + 0.5)
    return paler + flakes + flakes[::-1, ::-1]


# Mean red, green, blue of the five published photographs, and how bright and how rough their 32 x 32 pieces are:
# standard deviation of a piece's mean, and standard deviation within a piece.
FROST = (
    ((0.304, 0.584, 0.650), 0.042, 0.056),
    ((0.787, 0.805, 0.841), 0.034, 0.071),
    ((0.787, 0.805, 0.841), 0.034, 0.071),
    ((0.541, 0.601, 0.649), 0.041, 0.102),
    ((0.440, 0.483, 0.528), 0.064, 0.136),
)


def frost(image: Picture, rng: np.random.Generator, keep: float, ice: float) -> Picture:
    """`keep` of the image and `ice` of a streaked, icy texture (see the module's docstring)."""
    colour, unevenness, roughness = FROST[rng.integers(len(FROST))]
    height, width, channels = image.shape
    # Noise whose power falls with the frequency to the power of 1.2, as that of the photographs does (the script
    # shrinks them without smoothing), with streaks four times as long as wide.
    rows, columns = np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width
    angle = rng.uniform(0, math.pi)
    along = math.cos(angle) * columns + math.sin(angle) * rows
    across = math.cos(angle) * rows - math.sin(angle) * columns
    falloff = np.maximum(1, np.hypot(2 * along, across / 2)) ** -0.6
    falloff[0, 0] = 0
    texture = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) * falloff).real
    texture *= roughness / texture.std()
    layer = np.array(colour) + (texture + rng.normal(0, unevenness))[:, :, None]
    return keep * image + ice * np.clip(layer if channels == 3 else _grey(layer), 0, 1)


def fog(image: Picture, rng: np.random.Generator, amount: float, decay: float) -> Picture:
    """Lighter by `amount` times a fractal cloud, scaled back to the brightest value of the image."""
    height, width, _ = image.shape
    brightest = float(image.max())
    side = 1 << max(1, (max(height, width) - 1).bit_length())
    cloud = _cloud(side, decay, rng)[:height, :width, None]
    return (image + amount * cloud) * (brightest / (brightest + amount))


def brightness(image: Picture, _rng: np.random.Generator, amount: float) -> Picture:
    """The largest of red, green and blue (V of HSV) grows by `amount` at the same hue and saturation."""
    value = image.max(axis=2, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    scaled: Picture = np.where(value > 0, image * (brighter / np.where(value > 0, value, 1)), brighter)
    return scaled


def contrast(image: Picture, _rng: np.random.Generator, share: float) -> Picture:
    """`share` of each value's distance from the mean of its channel."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    flatter: Picture = (image - mean) * share + mean
    return flatter


def elastic_transform(
    image: Picture, rng: np.random.Generator, strength: float, smoothness: float, shift: float
) -> Picture:
    """A random affine map that moves three points by up to `shift`, then local stretching; in shares of the side."""
    height, width, _ = image.shape
    side = min(height, width)
    centre, arm = np.array([width // 2, height // 2], np.float64), float(side // 3)
    before = centre + np.array([[arm, arm], [arm, -arm], [-arm, -arm]])
    after = before + rng.uniform(-shift * side, shift * side, before.shape)
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)  # (x, y, 1) of the result -> (x, y) before
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    sources = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back
    moved = _sampled(image, sources[..., 1], sources[..., 0], "mirror")
    if strength == 0:
        return moved
    fields = [
        gaussian_filter(rng.uniform(-1, 1, (height, width)), smoothness * side, mode="reflect", truncate=3)
        * strength * side
        for _ in range(2)
    ]  # fmt: skip
    return _sampled(moved, rows + fields[1], columns + fields[0], "reflect")


def pixelate(image: Picture, _rng: np.random.Generator, share: float) -> Picture:
    """Shrunk to `share` of its side by averaging, and enlarged again."""
    height, width, _ = image.shape
    small = (max(1, int(width * share)), max(1, int(height * share)))
    shrunk = _to_pillow(image).resize(small, Image.Resampling.BOX)
    return _from_pillow(shrunk.resize((width, height), Image.Resampling.BOX))


def jpeg_compression(image: Picture, _rng: np.random.Generator, quality: float) -> Picture:
    """Written as JPEG of a `quality` by Pillow and read again."""
    file = BytesIO()
    _to_pillow(image).save(file, "JPEG", quality=int(quality))
    with Image.open(file) as read:
        return _from_pillow(read)


CORRUPTIONS: Mapping[str, Corruption] = {
    corruption.name: corruption
    for corruption in (
        Corruption("gaussian_noise", gaussian_noise, ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,))),
        Corruption("shot_noise", shot_noise, ((500,), (250,), (100,), (75,), (50,))),
        Corruption("impulse_noise", impulse_noise, ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,))),
        Corruption("defocus_blur", defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
        Corruption("glass_blur", glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
        Corruption("motion_blur", motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
        Corruption("zoom_blur", zoom_blur, ((1.06,), (1.11,), (1.16,), (1.21,), (1.26,))),
        Corruption("snow", snow, (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        )),
        Corruption("frost", frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
        Corruption("fog", fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
        Corruption("brightness", brightness, ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,))),
        Corruption("contrast", contrast, ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,))),
        Corruption("elastic_transform", elastic_transform, (
            (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03),
        )),
        Corruption("pixelate", pixelate, ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,))),
        Corruption("jpeg_compression", jpeg_compression, ((80,), (65,), (58,), (50,), (40,))),
    )
}  # fmt: skip


def _blurred(image: Picture, spread: float) -> Picture:
    return np.asarray(gaussian_filter(image, (spread, spread, 0), mode="nearest", truncate=4), np.float64)


def _grey(image: Picture) -> Picture:
    return image if image.shape[2] == 1 else (image @ LUMA)[:, :, None]


def _dragged(image: Picture, radius: float, spread: float, degrees: float) -> Picture:
    """The mean of copies shifted along one direction, weighted by one side of a bell curve (as ImageMagick does it)."""
    taps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-0.5 * (taps / spread) ** 2)
    weights /= weights.sum()
    height, width, _ = image.shape
    rows, columns = np.arange(height), np.arange(width)
    angle = math.radians(degrees)
    dragged = np.zeros_like(image)
    for tap, weight in zip(taps, weights, strict=True):
        down, right = math.ceil(tap * math.sin(angle) - 0.5), math.ceil(tap * math.cos(angle) - 0.5)
        shifted = image[np.clip(rows + down, 0, height - 1)][:, np.clip(columns + right, 0, width - 1)]
        dragged += weight * shifted
    return dragged


def _zoomed(image: Picture, factor: float) -> Picture:
    """The middle of the image, enlarged to the image's own size."""
    height, width, _ = image.shape
    tall, wide = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - tall) // 2, (width - wide) // 2
    enlarged = zoom(image[top : top + tall, left : left + wide], (factor, factor, 1), order=1)
    top, left = (enlarged.shape[0] - height) // 2, (enlarged.shape[1] - width) // 2
    return np.asarray(enlarged[top : top + height, left : left + width], np.float64)


def _cloud(side: int, decay: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A fractal surface in [0, 1] by midpoint displacement, `(side, side)`, seamless; `side` is a power of two.

    At each scale, points in the middle of four neighbours get their mean and a uniform displacement; from one scale to
    the next the displacement falls by the square of `decay`.
    """
    surface = np.zeros((side, side))
    step, reach = side, 100.0**2
    while step >= 2:
        half = step // 2
        corners = surface[::step, ::step]
        below = corners + np.roll(corners, -1, axis=0)
        middles = (below + np.roll(below, -1, axis=1)) / 4 + rng.uniform(-reach, reach, corners.shape)
        surface[half::step, half::step] = middles
        sides = corners + np.roll(corners, -1, axis=1) + middles + np.roll(middles, 1, axis=0)
        surface[::step, half::step] = sides / 4 + rng.uniform(-reach, reach, corners.shape)
        sides = corners + np.roll(corners, -1, axis=0) + middles + np.roll(middles, 1, axis=1)
        surface[half::step, ::step] = sides / 4 + rng.uniform(-reach, reach, corners.shape)
        step, reach = half, reach / decay**2
    return np.asarray((surface - surface.min()) / np.ptp(surface), np.float64)


def _sampled(image: Picture, rows: npt.NDArray[Any], columns: npt.NDArray[Any], beyond: str) -> Picture:
    """The image at these places, by linear interpolation; `beyond` says how it goes on past its edges."""
    channels = [
        map_coordinates(image[:, :, channel], [rows, columns], order=1, mode=beyond)
        for channel in range(image.shape[2])
    ]
    return np.stack(channels, axis=2)


def _to_pillow(image: Picture) -> Image.Image:
    pixels = np.round(image * 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _from_pillow(image: Image.Image) -> Picture:
    pixels = np.asarray(image, np.float64) / 255
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
