import pytest
import torch

from timm_deconv.kernels.onednn import FEW_PRODUCTS, as_images, inner_products, rows_times, rows_times_plus

SIZES = [(4096, 64, 64), (4099, 48, 96), (1024, 256, 128), (64, 8, 8), (50, 1, 1)]
"""Rows, features and outputs: many and few products, rows that are images and a prime number of them, one feature."""


def assert_close_to_float64(result, expected):
    assert (result.double() - expected).norm() <= 1e-6 * expected.norm()


def test_the_sizes_lie_on_both_sides_of_where_convolutions_begin():
    many = [rows * features * outputs > FEW_PRODUCTS for rows, features, outputs in SIZES]
    assert True in many and False in many


@pytest.mark.parametrize(("rows", "features", "outputs"), SIZES)
@pytest.mark.parametrize("sets", [1, 3])
def test_rows_times_is_the_matrix_product_plus_the_constant(rows, features, outputs, sets):
    a, m = torch.randn(sets, rows, features), torch.randn(sets, features, outputs)
    constant = torch.randn(sets, 1, outputs)
    expected = a.double() @ m.double()
    assert_close_to_float64(rows_times(a, m), expected)
    assert_close_to_float64(rows_times(a, m, constant), expected + constant)


@pytest.mark.parametrize(("rows", "features", "outputs"), SIZES)
@pytest.mark.parametrize("sets", [1, 3])
def test_rows_times_plus_weighs_both_terms(rows, features, outputs, sets):
    a, m = torch.randn(sets, rows, features), torch.randn(sets, features, outputs)
    summand = torch.randn(sets, rows, outputs)
    expected = 1.5 * summand.double() - 0.5 * a.double() @ m.double()
    assert_close_to_float64(rows_times_plus(a, m, summand, beta=1.5, alpha=-0.5), expected)
    assert_close_to_float64(rows_times_plus(a, m, summand), summand + a.double() @ m.double())


@pytest.mark.parametrize(("rows", "features", "outputs"), SIZES)
@pytest.mark.parametrize("sets", [1, 3])
def test_inner_products_are_those_of_all_pairs_of_columns(rows, features, outputs, sets):
    a, b = torch.randn(sets, rows, features), torch.randn(sets, rows, outputs)
    assert_close_to_float64(inner_products(a, b), a.double().mT @ b.double())


def test_rows_in_runs_of_samples_give_the_same_products():
    a, m = torch.randn(1, 64, 4096).mT, torch.randn(1, 64, 64)
    assert_close_to_float64(rows_times(a, m), a.double() @ m.double())
    assert_close_to_float64(inner_products(a, a), a.double().mT @ a.double())


def test_symmetric_matrices_give_the_same_products():
    a, m = torch.randn(1, 4096, 64), torch.randn(1, 64, 64)
    m = m + m.mT
    product = rows_times(a, m, symmetric=True)
    assert_close_to_float64(product, a.double() @ m.double())
    assert_close_to_float64(rows_times_plus(a, m, a, beta=2, symmetric=True), (2 * a + product).double())


def test_float64_keeps_its_precision():
    a, m = torch.randn(1, 4096, 64, dtype=torch.float64), torch.randn(1, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(rows_times(a, m), a @ m, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inner_products(a, a), a.mT @ a, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("count", [4096, 4099])
def test_images_hold_the_rows_as_pixels_and_copy_nothing(count):
    rows = torch.randn(1, count, 8)
    images = as_images(rows)
    assert images.data_ptr() == rows.data_ptr()
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images.permute(0, 2, 3, 1).reshape(1, count, 8), rows)
