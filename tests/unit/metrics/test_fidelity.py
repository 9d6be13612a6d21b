"""Compare scores with closed forms, other implementations, and sets made to defeat them."""

import math

import pytest
import torch

from betavae.metrics.fidelity import (
    Moments,
    Reference,
    average_repeats,
    estimate_moments,
    extract_pixel_features,
    find_likely_copies,
    find_nearest,
    frechet_distance,
    kid,
    label_tv_distance,
    prdc,
)


def test_frechet_distance_has_the_closed_forms():
    # For commuting covariances it is |m_1 - m_2|^2 + the sum of (s_1 - s_2)^2, for any axes.
    one, two = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.0, 0.5]).double()
    mean = torch.tensor([0.0, 1.0, -2.0]).double()
    rotation = torch.linalg.qr(torch.randn(3, 3).double()).Q
    for axes in (torch.eye(3).double(), rotation):
        a = Moments(axes @ mean, axes @ one.square().diag() @ axes.T)
        b = Moments(torch.zeros(3).double(), axes @ two.square().diag() @ axes.T)
        assert frechet_distance(a, b) == pytest.approx(5 + 4 + 4 + 0, rel=1e-9) == frechet_distance(b, a)
    # For others in two dimensions, tr (AB)^(1/2) is (tr AB + 2 (det AB)^(1/2))^(1/2).
    a, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([[1.0, -0.5], [-0.5, 4.0]]).double()
    root = (torch.trace(a @ b) + 2 * torch.det(a @ b).sqrt()).sqrt()
    zero = torch.zeros(2).double()
    wanted = (a.trace() + b.trace() - 2 * root).item()
    assert frechet_distance(Moments(zero, a), Moments(zero, b)) == pytest.approx(wanted, rel=1e-9)


def test_moments_are_those_of_the_rows():
    x = torch.randn(50, 4) * 3 + 1
    found = estimate_moments(x)
    torch.testing.assert_close(found.mean, x.double().mean(0))
    centered = x.double() - x.double().mean(0)
    torch.testing.assert_close(found.covariance, centered.T @ centered / 49)
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-9)
    shifted = estimate_moments(x + 2)
    assert frechet_distance(found, shifted) == pytest.approx(16, rel=1e-5)


def test_frechet_distance_agrees_with_a_matrix_root():
    from scipy.linalg import sqrtm

    a, b = estimate_moments(torch.randn(60, 5)), estimate_moments(torch.randn(80, 5) @ torch.randn(5, 5) + 0.3)
    root = torch.from_numpy(sqrtm((a.covariance @ b.covariance).numpy()).real)
    wanted = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-6)


def test_kid_is_an_unbiased_mean_over_pairs():
    one, two = torch.randn(4, 3), torch.randn(5, 3)

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    wanted = sum(kernel(one[i], one[j]) for i in range(4) for j in range(4) if i != j) / 12
    wanted += sum(kernel(two[i], two[j]) for i in range(5) for j in range(5) if i != j) / 20
    wanted -= 2 * sum(kernel(a, b) for a in one for b in two) / 20
    assert kid(one, two) == pytest.approx(wanted, rel=1e-5)
    same = torch.tensor([kid(torch.randn(20, 3), torch.randn(20, 3)) for _ in range(400)])
    assert abs(same.mean()) < 4 * same.std() / 20 and same.min() < 0


def test_prdc_of_identical_and_distant_sets():
    real = torch.randn(100, 4)
    # Each ball holds the copies of its center and of k neighbors.
    assert prdc(real, real) == (1, 1, pytest.approx(6 / 5), 1)
    assert prdc(real, real + 100) == (0, 0, 0, 0)


def test_precision_and_recall_tell_lost_from_added_modes():
    clumps = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    real = (clumps[:, None] + torch.rand(2, 50, 2)).flatten(0, 1)
    one_clump = torch.rand(100, 2)
    found = prdc(real, one_clump)  # a mode is lost
    assert found.precision > 0.8 and found.recall <= 0.5 and found.coverage <= 0.5
    found = prdc(one_clump, real)  # a mode is added
    assert found.precision <= 0.5 and found.recall > 0.8


def test_an_outlier_raises_precision_but_not_density():
    """As in figure 1 of Naeem et al. (2020), the ball of a lone real image holds many fakes."""
    torch.manual_seed(3)
    real = torch.cat((torch.randn(200, 2) * 0.1, torch.tensor([[10.0, 0.0]])))
    fake = torch.randn(200, 2) * 0.3 + torch.tensor([6.0, 3.0])
    found = prdc(real, fake)
    assert found.precision == 1 and found.density == pytest.approx(1 / 5) and found.coverage < 0.01


def test_nearest_label_distance_and_averages():
    among = torch.tensor([[0.0], [1.0], [5.0]])
    distance, rows = find_nearest(torch.tensor([[0.9], [4.0]]), among, 2)
    assert rows.tolist() == [[1, 0], [2, 1]] and distance.flatten().tolist() == pytest.approx(
        [0.1, 0.9, 1, 3], abs=1e-5
    )
    assert label_tv_distance(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 2])) == pytest.approx(0.5)
    assert label_tv_distance(torch.tensor([2, 0]), torch.tensor([0, 2, 0, 2])) == 0
    assert label_tv_distance(torch.tensor([-1, -1]), torch.tensor([-1, 10**9])) == 0.5
    found = average_repeats([{"a": 1.0}, {"a": 2.0}, {"a": 6.0}])["a"]
    assert found == {"mean": pytest.approx(3), "se": pytest.approx(math.sqrt(7) / math.sqrt(3))}


def test_distances_hold_far_from_zero():
    """A common offset of all features changes neither shares nor neighbors."""
    real, fake = torch.randn(2, 300, 8).mul(2**10).round() / 2**10  # so that the offset rounds none of them
    fake = torch.cat((fake, real[:20]))
    assert prdc(real + 512, fake + 512) == prdc(real, fake)
    assert prdc(real, fake).precision < 0.99
    for one, two in zip(find_nearest(fake + 512, real + 512, 3), find_nearest(fake, real, 3), strict=True):
        assert torch.equal(one, two)
    distance, rows = find_nearest(fake + 512, real + 512)
    assert rows[-20:, 0].tolist() == list(range(20)) and not distance[-20:].any()


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 28, 28), 784), ((1, 1, 2000), 1000), ((3, 2000, 1), 750), ((1, 3, 1001), 1002)]
)
def test_pixel_features_of_any_shape_are_small(shape, size):
    found = extract_pixel_features(torch.full((2, *shape), 0.25))
    assert found.shape == (2, size) and (found == 0.25).all()


def test_likely_copies_are_found_relative_to_usual_distances():
    real = torch.tensor([[0.0], [10.0], [11.0], [12.0]])  # the first image has no near neighbor
    fake = torch.tensor([[1.0], [10.5], [11.01]])
    rows, neighbors = find_likely_copies(fake, real, count=2, neighbors=2)
    assert rows.tolist() == [2, 0]  # 0.01 / 1, 1 / 10; the other one is 0.5 / 1
    assert neighbors.tolist() == [[2, 3], [0, 1]]


def test_copies_of_duplicated_images_are_found():
    real = torch.tensor([[0.0], [0.0], [10.0], [12.0], [15.0], [18.0]])
    fake = torch.tensor([[11.0], [0.0], [13.5], [0.001], [10.01]])
    assert find_likely_copies(fake, real, count=3, neighbors=2)[0].tolist() == [1, 3, 4]


def test_label_match_is_the_share_of_images_read_as_their_label():
    class Brightness:
        """Read the first pixel as the label."""

        def features(self, x):
            return x.flatten(1)

        def classify(self, features):
            return features[:, 0].round().long()

    x = torch.rand(60, 1, 2, 2)
    x[:, 0, 0, 0] = torch.arange(60) % 2
    labels = torch.arange(60) % 2
    wanted = labels.clone()
    wanted[:3] = 1 - wanted[:3]  # wrong in the first repeat only
    reference = Reference([x], labels, Brightness())
    scores, _ = reference.score(x.split(7), 30, wanted)
    assert scores["label_match"]["mean"] == pytest.approx((27 / 30 + 1) / 2)
    assert "label_match" not in reference.score(x.split(7), 30)[0]
