import re

from hypothesis import given, settings
from hypothesis import strategies as st

from betavae.runtime.hydra_config import job_name

# Few letters, so that many overrides look alike.
KEYS = st.text("ab_.", min_size=1, max_size=4)
VALUES = st.text("ab_.+-/=[]'\"A日,", max_size=5) | st.text("ab", min_size=199, max_size=203)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(KEYS, VALUES), max_size=3), min_size=2, max_size=4))
def test_different_overrides_have_different_folders(jobs: list[list[tuple[str, str]]]) -> None:
    texts = [",".join(f"{key}={value}" for key, value in job) for job in jobs]
    names = [job_name(text) for text in texts]
    assert len({name.lower() for name in names}) == len(set(texts))
    assert all(re.fullmatch(r"[A-Za-z0-9.,_-]{1,200}", name) for name in names)


def test_job_folders_have_the_names_of_their_overrides() -> None:
    assert job_name("beta=0.5,model.latent_dim=2,seed=-1") == "beta_0.5,model.latent_dim_2,seed_-1"
    assert re.fullmatch("beta_1,model.hidden_dims_400,200_[0-9a-f]{8}", job_name("beta=1,model.hidden_dims=[400,200]"))
    assert re.fullmatch("trainer.benchmark_true_[0-9a-f]{8}", job_name("+trainer.benchmark=true"))
