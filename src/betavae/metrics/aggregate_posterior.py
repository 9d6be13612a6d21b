"""What the latent space of a trained VAE holds."""

import math
import warnings

import torch
from torch import Tensor

from betavae.models.vae import VAE, Posterior

NEIGHBORS = 5  # of the nearest-neighbor classifier, which needs as many training images


def aggregate_posterior(posterior: Posterior, seed: int = 0, rows: int = 500) -> dict[str, float]:
    """How the aggregate posterior q(z) = 1/N sum_n q(z|x_n) of these N images differs from the prior.

    rate = mutual_information + marginal_kl (Hoffman & Johnson 2016, "ELBO surgery"): `mutual_information` is that of z
    and the number n of the image, `marginal_kl` is KL(q(z) || p(z)), both by one z of each q(z|x_n) and the whole sum
    over n. The mutual information cannot exceed log N: where it comes near, N images are too few to fill the latent
    space, and `marginal_kl` is rate - log N, far above that of unseen images. `moments_kl`, from a normal distribution
    with q(z)'s mean and covariance to the prior, is a lower bound of `marginal_kl`, and does not have that fault.
    """
    mean, logvar = posterior
    n, dimensions = mean.shape
    z = posterior.rsample(torch.randn(n, dimensions, generator=torch.Generator().manual_seed(seed)).double())
    precision = torch.exp(-logvar)
    # sum_d (z - mean)^2 / var as two matrix products, for all pairs of z and n.
    constant = (mean**2 * precision + logvar).sum(1)
    log_q = torch.cat(
        [
            (-0.5 * (part**2 @ precision.T + constant) + part @ (mean * precision).T).logsumexp(1) - math.log(n)
            for part in z.split(rows)
        ]
    )
    log_p = -0.5 * (z**2).sum(1)  # as in log_q, less the same constant
    own = -0.5 * ((z - mean) ** 2 * precision + logvar).sum(1)
    centred = mean - mean.mean(0)
    covariance = centred.T @ centred / n + torch.diag(logvar.exp().mean(0))
    moments = 0.5 * (covariance.trace() + (mean.mean(0) ** 2).sum() - dimensions - covariance.logdet())
    return {
        "mutual_information": (own - log_q).mean().item(),
        "mutual_information_limit": math.log(n),
        "marginal_kl": (log_q - log_p).mean().item(),
        "moments_kl": moments.item(),
    }


@torch.no_grad()
def posterior_means(vae: VAE, x: Tensor) -> Tensor:
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(part.to(device)).mean.cpu() for part in x.split(1000)])


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Test accuracy of 5 nearest neighbours, and of logistic regression, on posterior means."""
    from sklearn.linear_model import LogisticRegression  # here, since it takes a second
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifiers = {
        "knn_accuracy": KNeighborsClassifier(NEIGHBORS, algorithm="brute"),
        "linear_accuracy": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    }
    pairs = [part.numpy() for part in (train, train_labels, test, test_labels)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, about classes with few images and unfinished optimization
        return {name: float(c.fit(*pairs[:2]).score(*pairs[2:])) for name, c in classifiers.items()}
