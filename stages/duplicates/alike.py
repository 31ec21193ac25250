"""Whether two thumbnails show the same image: perceptual hashes alone take a cat for a dog on the same sofa."""

import numpy as np

_MOST_MEAN_SHIFT = 24.0  # of the mean of a channel; a crop of 5 % of an image on white shifts it by 12
_MOST_DIFFERENCE = 40.0  # on average, before alignment; images of which one is a crop of 5 % differ by half of it
_EQUAL_MEAN, _EQUAL_MOST = 2.0, 10.0  # without alignment: after compression or a change of the size
_ALIKE_MEAN, _ALIKE_MOST = 5.0, 30.0  # once they lie on each other: a crop has other pixels at the edges of shapes
_MARGIN = 3  # pixels at the border, of which a crop may have none
_ITERATIONS, _PRECISION = 20, 1e-4


def alike(first: np.ndarray, second: np.ndarray, *, mirrored: bool) -> bool:
    """Whether two thumbnails are of the same image, up to compression, size and a crop.

    The second is laid on the first by an affine map (OpenCV's `findTransformECC`). Then they may differ by 5 levels on
    average, and by 30 in any 3 x 3 pixels.

    Args:
        first, second: uint8 (side, side, 3).
        mirrored: compare with the mirrored second one.
    """
    if mirrored:
        second = np.ascontiguousarray(second[:, ::-1])
    means = first.mean(axis=(0, 1)) - second.mean(axis=(0, 1))
    if np.abs(means).max() > _MOST_MEAN_SHIFT:
        return False
    if np.abs(first.astype(np.int16) - second).mean() > _MOST_DIFFERENCE:
        return False
    return _within(first, second, _EQUAL_MEAN, _EQUAL_MOST) or _within(
        first, _laid_on(first, second), _ALIKE_MEAN, _ALIKE_MOST
    )


def _within(first: np.ndarray, second: np.ndarray, mean: float, most: float) -> bool:
    import cv2

    inner = slice(_MARGIN, -_MARGIN)
    difference = np.abs(first[inner, inner].astype(np.float32) - second[inner, inner])
    return float(difference.mean()) <= mean and float(cv2.blur(difference, (3, 3)).max()) <= most


def _laid_on(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The second thumbnail, moved so that it fits the first best; as it is if nothing in it shows how."""
    import cv2

    cv2.setNumThreads(1)
    gray, other = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (first, second))
    start = np.eye(2, 3, dtype=np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, _ITERATIONS, _PRECISION)
    try:
        everywhere = np.ones(other.shape, np.uint8)
        _, warp = cv2.findTransformECC(gray, other, start, cv2.MOTION_AFFINE, stop, everywhere, 1)
    except cv2.error:  # such as of an image of one colour
        return second
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(second, warp, gray.shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
