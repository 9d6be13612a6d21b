"""Properties for random inputs, and random command lines."""

import os
import random
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from betavae import data
from betavae.data import ImageSet
from betavae.data.datamodule import ImageDataModule
from betavae.data.loader import BatchLoader
from betavae.errors import UserError
from betavae.models.likelihoods import LIKELIHOODS
from betavae.models.networks import ACTIVATIONS, NETWORKS
from betavae.models.vae import VAE
from betavae.objectives import elbo
from betavae.objectives.schedules import BETA_SCHEDULES
from betavae.optim import LR_DECAYS, lr_factor
from betavae.runtime.hydra_config import CONFIGS, all_keys, describe_config_error, to_plain
from betavae.runtime.run_folder import RunFolder
from betavae.runtime.settings import TrainConfig, check_settings, dotted_keys
from betavae.runtime.training import TrainingRun
from tests.integration.fuzz_commands import Session, hostile_word, play

quick = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.forked
@quick
@given(
    likelihood=st.sampled_from(sorted(LIKELIHOODS)),
    network=st.sampled_from(sorted(NETWORKS)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    latent=st.integers(1, 5),
    k=st.integers(1, 3),
    batch=st.integers(1, 4),
    size=st.integers(4, 9),
    beta=st.floats(0, 100),
    free_bits=st.floats(0, 3),
    scale=st.floats(0, 8),
)
def test_elbo_terms_for_random_models(likelihood, network, activation, latent, k, batch, size, beta, free_bits, scale):
    torch.manual_seed(0)
    vae = VAE(network, [3, 4], latent, activation, likelihood, (1, size, size)).double()
    for parameter in vae.parameters():
        parameter.data.mul_(scale)
    x, noise = torch.rand(batch, 1, size, size).double(), torch.randn(k, batch, latent).double()
    terms = elbo(vae, x, noise, beta)
    assert terms.recon.shape == (batch,) and terms.kl.shape == (batch, latent)
    assert (terms.kl >= -1e-12).all()  # rounding
    torch.testing.assert_close(terms.loss, terms.recon.mean() + beta * terms.kl.sum(1).mean())
    terms.loss.backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters())
    # Free bits add to the loss at most the floor of every dimension.
    floored = elbo(vae, x, noise, beta, free_bits).loss - terms.loss
    rounding = 1e-9 + 1e-6 * terms.loss.abs()
    assert -rounding <= floored <= beta * latent * free_bits + rounding
    # The mean over posterior samples is the mean of single samples.
    alone = torch.stack([elbo(vae, x, noise[[i]], beta).loss for i in range(k)]).mean()
    torch.testing.assert_close(terms.loss, alone)


@quick
@given(
    step=st.integers(0, 10**6),
    total=st.one_of(st.integers(1, 10**6), st.just(float("inf"))),
    warmup=st.floats(0, 1),
    cycles=st.integers(1, 50),
    ramp=st.floats(0, 1, exclude_min=True),
    decay=st.sampled_from(sorted(LR_DECAYS)),
)
def test_schedules_stay_in_range_and_end_at_one(step, total, warmup, cycles, ramp, decay):
    if total == float("inf"):
        return
    for name, arguments in {
        "constant": {},
        "linear": {"warmup": warmup},
        "cyclical": {"cycles": cycles, "ramp": ramp},
    }.items():
        factor = BETA_SCHEDULES[name]
        assert 0 <= factor(step, total, **arguments) <= 1
        assert factor(total, total, **arguments) == 1  # every schedule ends at beta
    linear = BETA_SCHEDULES["linear"]
    assert linear(step, total, warmup=warmup) <= linear(step + 1, total, warmup=warmup)
    assert 0 <= lr_factor(step, total, decay, warmup) <= 1
    if step >= warmup * total:
        assert lr_factor(step + 1, total, decay, warmup) <= lr_factor(step, total, decay, warmup) + 1e-12
    else:
        assert lr_factor(step, total, decay, warmup) > 0


@quick
@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
    processes=st.integers(1, 4),
    stop=st.integers(0, 60),
)
def test_batches_cover_each_image_once_and_resume(n, batch_size, epoch, seed, processes, stop):
    images = ImageSet(torch.zeros(n, 1, 2, 2, dtype=torch.uint8), torch.arange(n))

    def shared(rank, *training):
        batches = BatchLoader(images, batch_size, *training)
        batches.shard(rank, processes)
        return batches

    seen = []
    for rank in range(processes):
        batches = shared(rank, lambda: epoch, seed)
        shard = [y.tolist() for _, y in batches]
        assert len(shard) == len(batches)
        # Another loader that resumes after any batch yields the same images.
        first = iter(batches := shared(rank, lambda: epoch, seed))
        before = [y.tolist() for _, (_, y) in zip(range(stop), first, strict=False)]
        after = shared(rank, lambda: epoch, seed)
        after.load_state_dict(dict(batches.state_dict()))
        assert before + [y.tolist() for _, y in after] == shard
        seen += [i for batch in shard for i in batch]
    # Each image at most once; every process has the same number, so fewer images than processes are left out.
    assert len(set(seen)) == len(seen) == n - n % processes
    evaluated = [i for rank in range(processes) for _, y in shared(rank) for i in y.tolist()]
    assert sorted(evaluated) == list(range(n))


def tiny(root: Path, split: str) -> ImageSet | None:
    if split == "validation":
        return None
    n = 60 if split == "train" else 10
    pixels = (torch.arange(n) % 256).to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 28, 28).clone()
    return ImageSet(pixels, torch.arange(n) % 10)


@quick
@given(
    validation=st.integers(0, 59),
    binarize=st.sampled_from(["none", "threshold", "dynamic"]),
    seeds=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)
def test_splits_are_disjoint_and_independent_of_the_seed(validation, binarize, seeds):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "mnist", tiny)
        modules = [ImageDataModule("mnist", "nowhere", validation, 1, 10, binarize, seed) for seed in seeds]
        for module in modules:
            module.setup()
    sets = modules[0].splits
    assert {name: len(images) for name, images in sets.items()} == {
        "train": 60 - validation,
        "validation": validation,
        "test": 10,
    }
    # The same for every seed.
    for name, images in modules[1].splits.items():
        assert torch.equal(images.pixels, sets[name].pixels) and torch.equal(images.labels, sets[name].labels)
    if binarize == "none":
        pixels = torch.cat((sets["train"].pixels, sets["validation"].pixels))[:, 0, 0, 0]
        assert pixels.sort().values.tolist() == list(range(60))  # no image twice, none lost
    else:
        for name in ("validation", "test"):
            assert set(sets[name].pixels.unique().tolist()) <= {0, 255}
        x, _ = next(iter(modules[0].train_dataloader()))  # a new draw for each batch, or always the same
        assert set(x.unique().tolist()) <= {0, 1}


GOOD = [
    *(
        "beta=4",
        "seed=0",
        "model=conv",
        "model=mlp_large",
        "data=mnist_binarized",
        "beta_schedule=linear",
        "optimizer=sgd",
    ),
    *("beta_schedule=cyclical", "lr_schedule=cosine", "trainer=smoke", "experiment=tutorial", "model.latent_dim=2"),
    *("trainer.max_epochs=3", "trainer.precision=64-true", "objective.k=5", "model.hidden_dims=[3,2]", "name=a"),
]


def command_line(rng: random.Random, keys: list[str]) -> list[str]:
    line = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.4:
            line.append(rng.choice(GOOD))
            continue
        line.append(hostile_word(rng, keys))
    return line


@pytest.mark.slow
def test_random_command_lines_build_or_are_rejected(monkeypatch, tmp_path):
    """BETAVAE_FUZZ=2000 tests more of them."""
    monkeypatch.setitem(data.DATASETS, "mnist", tiny)
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    keys = sorted({*dotted_keys(TrainConfig), *all_keys()} - {"resume"})
    built = rejected = 0
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for number in range(int(os.environ.get("BETAVAE_FUZZ", 100))):
            line = command_line(rng, keys)
            composing = True
            try:
                cfg = compose("train", ["data.batch_size=5", "data.validation_size=10", *line])
                composing = False
                check_settings(to_plain(cfg))
                if cfg.data.name == "mnist":
                    TrainingRun(to_plain(cfg), RunFolder(tmp_path))
                built += 1
            except Exception as error:
                sentence = describe_config_error(error, composing)
                assert sentence and "\n" not in sentence, (number, line)
                assert isinstance(error, UserError) or len(sentence) < 500
                rejected += 1
    assert built > 10 and rejected > 10
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 5, 16, 17])
def test_random_sessions_of_complete_commands(tmp_path, data_root, number):
    """`python -m tests.integration.fuzz_commands` runs these for hours."""
    play(random.Random(f"test-{number}"), Session(tmp_path, Path(data_root)))
