"""Augmentation, crops and standardisation against numpy and TensorFlow's own operations, and by statistics.

The random draws are recovered from the augmented images, so the tests do not depend on how they are drawn.
"""
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import affine_transform
from scipy.stats import chisquare, kstest

from twta.graph import preprocessing
from twta.graph.tf1 import tf

RNG = np.random.default_rng(5)
N = 2000
IMAGES = RNG.integers(0, 256, (N, 32, 32, 3), np.uint8)  # noise: no two crops are alike


def run(function, images, *arguments):
    with tf.Graph().as_default(), tf.Session() as session:
        return session.run(function(tf.constant(images), *arguments))


def augment(images, size, seed, step):
    """Return the images as for_training augments them, but not standardised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, 'standardize', lambda x: x)
        return preprocessing.for_training(images, size, seed, step)


def centred(x):
    return x - x.mean(axis=(-2, -1), keepdims=True)


def read_off(image, augmented):
    """Return (top, left, flipped, brightness, contrast) of an augmented image, by trying all crops and flips."""
    best = (-1,)
    for flipped in (False, True):
        channel = augmented[:, ::-1, 0] if flipped else augmented[..., 0]
        windows = sliding_window_view(image[..., 0].astype(np.float64), (24, 24))
        likeness = (centred(windows) * centred(channel)).sum(axis=(2, 3)) / centred(windows).std(axis=(2, 3))
        top, left = np.unravel_index(likeness.argmax(), likeness.shape)
        best = max(best, (likeness.max(), int(top), int(left), flipped))
    _, top, left, flipped = best
    crop = image[top:top + 24, left:left + 24].astype(np.float64)
    crop = crop[:, ::-1] if flipped else crop
    contrast = augmented[..., 0].std() / crop[..., 0].std()
    brightness = augmented.mean() - crop.mean()
    mean = crop.mean(axis=(0, 1))
    np.testing.assert_allclose(augmented, (crop - mean) * contrast + mean + brightness, atol=5e-3)
    return top, left, flipped, brightness, contrast


@pytest.fixture(scope='module')
def drawn():
    augmented = run(augment, IMAGES, 24, 3, 7)
    assert augmented.shape == (N, 24, 24, 3) and augmented.dtype == np.float32
    return np.array([read_off(image, result) for image, result in zip(IMAGES, augmented, strict=True)]).T


def test_every_image_is_cropped_flipped_brightened_and_stretched(drawn):
    """TensorFlow's operations agree with the recovered draws; read_off has compared numpy's."""
    augmented = run(augment, IMAGES, 24, 3, 7)

    def published(image, top, left, flipped, brightness, contrast):
        x = tf.cast(image[top:top + 24, left:left + 24], tf.float32)
        x = tf.image.flip_left_right(x) if flipped else x
        return tf.image.adjust_contrast(tf.image.adjust_brightness(x, brightness), contrast)

    for i in range(5):
        top, left, *rest = drawn[:, i]
        np.testing.assert_allclose(augmented[i], run(published, IMAGES[i], int(top), int(left), *rest), atol=5e-3)


def test_crops_are_uniform_over_all_81_places(drawn):
    top, left = drawn[:2].astype(int)
    counts = np.bincount(9 * top + left, minlength=81)
    assert len(counts) == 81 and chisquare(counts).pvalue > 0.001


def test_half_are_flipped(drawn):
    assert abs(drawn[2].mean() - 0.5) < 3.3 * 0.5 / N ** 0.5


def test_brightness_and_contrast_are_uniform_in_the_published_ranges(drawn):
    for values, low, high in ((drawn[3], -63, 63), (drawn[4], 0.2, 1.8)):
        assert low - 1e-3 <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high + 1e-3
        assert kstest(values, 'uniform', (low, high - low)).pvalue > 0.001


def test_draws_are_independent_of_each_other(drawn):
    assert np.abs(np.corrcoef(drawn) - np.eye(5)).max() < 3.7 / N ** 0.5


def test_seed_and_step_decide():
    images = IMAGES[:20]
    first = run(preprocessing.for_training, images, 24, 3, 7)
    np.testing.assert_array_equal(first, run(preprocessing.for_training, images, 24, 3, 7))
    for seed, step in ((4, 7), (3, 8), (7, 3)):
        other = run(preprocessing.for_training, images, 24, seed, step)
        assert all(np.abs(x - y).max() > 0.1 for x, y in zip(first, other, strict=True))


def test_standardisation_is_tensorflows_and_numpys():
    images = RNG.normal(100, 40, (8, 24, 24, 3)).astype(np.float32)
    found = run(preprocessing.standardize, images)
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=(1, 2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(found, run(tf.image.per_image_standardization, images), atol=1e-5)
    mean, std = images.mean(axis=(1, 2, 3), keepdims=True), images.std(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(found, (images - mean) / std, atol=1e-5)


def test_uniform_images_are_not_divided_by_zero():
    images = np.full((2, 24, 24, 3), 200, np.float32)
    images[1, 0, 0, 0] = 200.5  # its standard deviation, 0.012, is below the smallest divisor, 1 / sqrt(1728)
    found = run(preprocessing.standardize, images)
    assert not found[0].any()
    np.testing.assert_allclose(found[1], (images[1] - images[1].mean()) * 1728 ** 0.5, atol=1e-3)
    np.testing.assert_allclose(found, run(tf.image.per_image_standardization, images), atol=1e-3)


def test_evaluation_takes_the_central_crop():
    crop = IMAGES[:5, 4:28, 4:28].astype(np.float32)
    np.testing.assert_allclose(run(preprocessing.for_evaluation, IMAGES[:5], 24),
                               run(tf.image.per_image_standardization, crop), atol=1e-5)


@pytest.mark.parametrize('treat', [preprocessing.for_evaluation,
                                   lambda x, crop: preprocessing.for_training(x, crop, 0, 1)])
def test_without_a_crop_pixels_are_divided_by_256(treat):
    np.testing.assert_array_equal(run(treat, IMAGES[:5], 0), IMAGES[:5].astype(np.float32) / 256)


def test_geometric_augmentation_of_crops_leaves_brightness_and_contrast():
    images = IMAGES[:50]
    found = run(preprocessing.for_training, images, 24, 3, 7, 'geometric')
    same = [any(np.abs(found[i] - standardised(crop)).max() < 1e-4 for crop in crops(image))
            for i, image in enumerate(images)]
    assert all(same)


def crops(image):
    for top in range(9):
        for left in range(9):
            crop = image[top:top + 24, left:left + 24].astype(np.float32)
            yield from (crop, crop[:, ::-1])


def standardised(image):
    return (image - image.mean()) / image.std()


def warp(images, *draws):
    return run(lambda x: preprocessing.warp(tf.cast(x, tf.float32), tf.constant([draws] * len(images), tf.float32)),
               images)


def test_the_middle_of_every_draw_is_the_identity_and_the_last_two_shift():
    images = IMAGES[:3, :28, :28, :1]
    middle = (0.5,) * 4
    np.testing.assert_array_equal(warp(images, *middle, 0.5, 0.5), images)
    right = warp(images, *middle, 1, 0.5)  # by two pixels; pixels from beyond the border are 0
    np.testing.assert_allclose(right[:, :, :26], images[:, :, 2:], atol=1e-3)
    assert not right[:, :, 26:].any()
    up = warp(images, *middle, 0.5, 0)
    np.testing.assert_allclose(up[:, 2:], images[:, :26], atol=1e-3)


def test_a_warp_is_scipys_affine_transform():
    images = IMAGES[:4, :28, :28, :1]
    draws = RNG.random(6)
    a, b, c, d, right, down = 2 * draws - 1
    matrix = np.eye(2) + 0.15 * np.array([[d, c], [b, a]])  # acts on (row, column)
    offset = 13.5 - matrix @ [13.5, 13.5] + 2 * np.array([down, right])
    expected = [affine_transform(image[..., 0].astype(np.float64), matrix, offset, order=1, mode='grid-constant')
                for image in images]
    np.testing.assert_allclose(warp(images, *draws)[..., 0], expected, atol=0.02)


def test_whole_images_are_warped_each_in_its_own_way_by_seed_and_step():
    images = np.repeat(IMAGES[:1, :28, :28, :1], 20, axis=0)
    first = run(preprocessing.for_training, images, 0, 3, 7, 'geometric')
    assert first.shape == images.shape and first.min() >= 0 and first.max() < 1
    assert all(np.abs(first[0] - other).max() > 0.1 for other in first[1:])
    np.testing.assert_array_equal(first, run(preprocessing.for_training, images, 0, 3, 7, 'geometric'))
    for seed, step in ((4, 7), (3, 8)):
        assert np.abs(first - run(preprocessing.for_training, images, 0, seed, step, 'geometric')).max() > 0.1


@pytest.mark.parametrize('crop, side', [(24, 24), (0, 32)])
def test_cutout_erases_a_square_anywhere(crop, side, monkeypatch):
    """The centres of the squares are uniform, near the borders too."""
    monkeypatch.setattr(preprocessing, 'warp', lambda images, draws: images)
    found = run(preprocessing.for_training, IMAGES | 1, crop, 3, 7, 'cutout')
    erased = (found == 0).all(axis=3)
    rows, columns = erased.any(2), erased.any(1)
    assert (erased == (rows[:, :, None] & columns[:, None])).all()
    for lines in (rows, columns):
        sizes = lines.sum(1)
        inside = ~lines[:, 0] & ~lines[:, -1]
        assert set(sizes[inside]) == {8} and sizes.min() >= 4 and sizes.max() == 8
        assert chisquare(np.bincount(lines[inside].argmax(1) - 1, minlength=side - 9)).pvalue > 0.001
        assert inside.mean() == pytest.approx(1 - 9 / side, abs=0.05)
