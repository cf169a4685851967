"""Fixtures that all tests share."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from kinds import KINDS

import charrnn_fast

# The same examples in every run, however busy the machine; `make fuzz` draws new ones.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture(params=charrnn_fast.available_isas())
def isa(request):
    """Every instruction set that this machine runs, one after the other."""
    with charrnn_fast.use_isa(request.param):
        yield request.param


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    """Every kind of network."""
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    """The same random numbers whatever ran before, and no leaking default settings."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
