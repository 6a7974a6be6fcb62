import threading
from collections import Counter

import pytest

from cluster.leases import Lease, Leases
from service.errors import ExpiredError, UnavailableError

FOREVER = 100.0


class Lending:
    """Lends its actors in turn, again and again; a closed gate holds callers back."""

    def __init__(self, *actors):
        self.actors, self.asked, self.gate = actors, Counter(), threading.Event()
        self.gate.set()

    def __call__(self):
        assert self.gate.wait(FOREVER)
        actor = self.actors[self.asked.total() % len(self.actors)]
        self.asked[actor] += 1
        if isinstance(actor, Exception):
            raise actor
        return Lease(actor, None)


@pytest.fixture
def leases_of():
    made = []

    def make(lending, term_seconds=FOREVER):
        made.append(Leases(lending, term_seconds))
        return made[-1]

    yield make
    for leases in made:
        leases.close()


def wanted():
    return FOREVER


def test_batches_one_after_the_other_share_a_lease(leases_of):
    leases = leases_of(lending := Lending("a", "b"))

    for _ in range(20):
        with leases.one(wanted) as lease:
            assert lease.actor == "a"

    assert lending.asked == {"a": 1}


def test_batches_at_once_have_a_lease_each(leases_of):
    leases = leases_of(Lending("a", "b"))

    with leases.one(wanted) as first, leases.one(wanted) as second:
        assert {first.actor, second.actor} == {"a", "b"}


def test_as_many_are_renewed_as_ran_at_once(leases_of):
    leases = leases_of(lending := Lending("a", "b"), term_seconds=0.2)

    with leases.one(wanted), leases.one(wanted):
        before = lending.asked.total()
        for _ in range(1000):
            if lending.asked.total() >= before + 4:
                break
            threading.Event().wait(0.01)
    lending.gate.clear()  # what there is now was lent in a term that began with two batches

    few = iter([1.0, 0.0])
    with leases.one(lambda: next(few)) as first, leases.one(lambda: next(few)) as second:
        assert {first.actor, second.actor} == {"a", "b"}
    lending.gate.set()


def test_a_dropped_lease_is_not_used_again(leases_of):
    leases = leases_of(Lending("a", "b"))

    with leases.one(wanted) as first:
        leases.drop(first)
    with leases.one(wanted) as second:
        assert second.actor == "b"


def test_a_lost_actor_is_given_to_nobody_even_when_it_is_lent_again(leases_of):
    leases = leases_of(lending := Lending("a", "a", "a", "b"))

    with leases.one(wanted) as first:
        leases.drop(first, lost=True)
    with leases.one(wanted) as second:
        assert second.actor == "b"
    assert lending.asked["a"] == 3


def test_a_refusal_is_followed_by_another_try(leases_of):
    leases = leases_of(Lending(RuntimeError("no replica"), "a"))

    with leases.one(wanted) as lease:
        assert lease.actor == "a"


def test_nobody_waits_longer_for_a_lease_than_for_an_answer(leases_of):
    lending = Lending("a")
    lending.gate.clear()
    leases, left = leases_of(lending), iter([1.0, 0.1, 0.0])

    with pytest.raises(ExpiredError, match="nobody waits"), leases.one(lambda: next(left)):
        pass
    lending.gate.set()


def test_no_lease_is_to_be_had_after_the_end(leases_of):
    lending = Lending("a")
    lending.gate.clear()
    leases = leases_of(lending)
    leases.close()

    with pytest.raises(UnavailableError, match="is being unloaded"), leases.one(wanted):
        pass
    lending.gate.set()
