import pytest


@pytest.fixture(scope="module")
def data(data_root: str) -> str:
    """Return the setting of the data folder."""
    return f"data.root={data_root}"
