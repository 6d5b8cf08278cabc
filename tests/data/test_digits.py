"""The embedded digits are what their page says."""

import numpy as np
from sklearn.datasets import load_digits

from timm_deconv.data import Digits


def test_training_and_test_digits_are_all_digits_once():
    train, test = Digits(train=True), Digits(train=False)
    assert (len(train), len(test)) == (1433, 364)
    counts = np.bincount(train.targets) + np.bincount(test.targets)
    assert counts.tolist() == np.bincount(load_digits().target).tolist()


def test_every_class_gives_a_fifth_of_its_images_to_the_test():
    train, test = np.bincount(Digits(train=True).targets), np.bincount(Digits(train=False).targets)
    assert np.abs(test / (train + test) - 0.2).max() < 0.006


def test_digits_are_scikit_learns_images_enlarged():
    digits = load_digits()
    image, label = Digits(train=False)[0]
    pixels = np.asarray(image)
    assert image.size == (32, 32) and label == digits.target[0]
    assert (pixels == pixels[..., :1]).all()
    small = pixels[..., 0].reshape(8, 4, 8, 4).mean((1, 3)) * 16 / 255
    assert np.abs(small - digits.images[0]).mean() < 1.5  # of 16; enlarging smooths
    assert np.corrcoef(small.ravel(), digits.images[0].ravel())[0, 1] > 0.97


def test_the_recipes_mean_and_deviation_are_those_of_the_training_images():
    pixels = np.stack([np.asarray(image) for image in Digits(train=True).images]) / 255
    assert (round(pixels.mean(), 4), round(pixels.std(), 4)) == (0.3057, 0.3237)
