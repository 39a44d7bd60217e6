"""Ways between two images."""

import pytest
import torch

from vae.errors import InputError
from vae.explore import interpolate, path, slerp


@pytest.mark.parametrize("spherical", [False, True])
def test_both_ends_are_the_reconstructions_of_the_images(autoencoder, images, spherical):
    walked = interpolate(autoencoder, images[0], images[1], 3, spherical=spherical)
    with torch.no_grad():
        expected = torch.cat([autoencoder.decode(autoencoder.encode(image[None]).mode()) for image in images])
    assert walked.shape == (3, 3, 24, 32)
    torch.testing.assert_close(walked[[0, -1]], expected, atol=1e-5, rtol=0)


def test_the_arc_between_vectors_of_one_norm_keeps_it_and_the_line_does_not():
    first, second = (vector / vector.norm() for vector in torch.randn(2, 4, 5, 6))
    norms = path(first, second, 5, slerp).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(5))
    assert path(first, second, 5)[2].norm() < 0.9


def test_the_arc_turns_by_equal_angles():
    points = path(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 4, slerp)
    torch.testing.assert_close(torch.atan2(points[:, 1], points[:, 0]), torch.deg2rad(torch.tensor([0.0, 30, 60, 90])))


def test_arc_and_line_have_the_same_ends():
    first, second = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(path(first, second, 2, slerp), torch.stack([first, second]))
    assert torch.equal(path(first, second, 2), torch.stack([first, second]))


@pytest.mark.parametrize("factor", [2.0, 1.0, 0.0, -1.0])
def test_between_parallel_opposite_and_zero_vectors_the_arc_is_the_line(factor):
    first = torch.randn(3, 4)
    assert torch.equal(path(first, factor * first, 4, slerp), path(first, factor * first, 4))


def test_the_line_between_images_is_their_cross_fade(images):
    torch.testing.assert_close(path(images[0], images[1], 3)[1], images.mean(dim=0))


def test_one_step_and_images_of_two_sizes_are_refused(autoencoder, images):
    with pytest.raises(InputError, match="steps=1, expected 2 or more"):
        interpolate(autoencoder, images[0], images[1], 1)
    with pytest.raises(InputError, match="images of 32x24 and 16x24 pixels, expected two of the same size"):
        interpolate(autoencoder, images[0], images[1, :, :, :16], 4)
