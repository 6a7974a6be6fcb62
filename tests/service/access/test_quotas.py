import pytest

from service.access.quotas import Quotas
from service.errors import OverloadedError


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_client_may_burst_and_then_keep_the_rate(clock):
    quotas = Quotas("calls", 10.0, 2.0, 100, clock)
    for _ in range(20):
        quotas.take("a", 1)
    with pytest.raises(OverloadedError, match="expected at most 10 calls a second from one client, got more") as caught:
        quotas.take("a", 1)
    assert (caught.value.reason, caught.value.retry_after_seconds) == ("rate", pytest.approx(0.1))
    clock.now += caught.value.retry_after_seconds
    quotas.take("a", 1)


def test_clients_do_not_share(clock):
    quotas = Quotas("calls", 1.0, 1.0, 100, clock)
    quotas.take("a", 1)
    quotas.take("b", 1)


def test_a_call_for_more_than_a_burst_is_let_in_when_the_bucket_is_full_and_paid_for_afterwards(clock):
    quotas = Quotas("images", 100.0, 1.0, 100, clock)
    quotas.take("a", 250)
    with pytest.raises(OverloadedError) as caught:
        quotas.take("a", 1)
    assert caught.value.retry_after_seconds == pytest.approx(1.51)
    clock.now += 1.51
    quotas.take("a", 1)


def test_who_is_refused_pays_nothing(clock):
    quotas = Quotas("calls", 1.0, 1.0, 100, clock)
    quotas.take("a", 1)
    for _ in range(50):
        with pytest.raises(OverloadedError):
            quotas.take("a", 1)
    clock.now += 1
    quotas.take("a", 1)


def test_no_rate_is_no_limit():
    quotas = Quotas("calls", 0.0, 1.0, 100)
    for _ in range(1000):
        quotas.take("a", 1000)
    assert len(quotas) == 0


def test_clients_remembered_are_bounded(clock):
    quotas = Quotas("calls", 1.0, 1.0, 3, clock)
    for client in range(1000):
        quotas.take(str(client), 1)
    assert len(quotas) == 3


def test_setting_the_date_opens_no_bucket(monkeypatch):
    import time

    quotas = Quotas("calls", 0.001, 1.0, 100)
    quotas.take("a", 1)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(OverloadedError):
        quotas.take("a", 1)
