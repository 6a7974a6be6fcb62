"""Every order of events that hypothesis can think of, on a clock and a model that go only where they are put."""

import asyncio
import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.batching import NEWEST_WEIGHT, MicroBatcher
from service.errors import ExpiredError, OverloadedError, UnavailableError

MAX_WAIT_SECONDS = 20.0
BYTES_EACH = 3

# How the model takes the next batch: as it is, failing as a whole but not for single items, or with too few answers.
GOOD, FRAGILE, FORGETFUL = "good", "fragile", "forgetful"


class Caller:
    """One submission as its caller sees it."""

    def __init__(self, number, size, poison, deadline):
        self.items = [(number, position, position in poison) for position in range(size)]
        self.number = number
        self.deadline = deadline
        self.arrived = None  # when it came into the queue, by the clock
        self.hopeless = False  # whether it was once too late to run, by the measured pace, while it waited
        self.taken = 0  # how many of its items have come to the model
        self.cancelled = False
        self.task = None

    @property
    def waits(self):
        return self.arrived is not None and not self.task.done() and not self.cancelled and self.taken < len(self.items)


class Worker:
    """Holds the batch that was handed to it until the machine says that the model is done."""

    def __init__(self, machine):
        self.machine = machine
        self.held = None

    def start(self, work, done):
        assert self.held is None, "two batches at once"
        self.held = work, done
        self.machine.check_start(work.args[0].items)

    def close(self):
        pass


class Batching(RuleBasedStateMachine):
    """Callers come, go and wait; time passes; the model finishes, fails and chokes on poison."""

    callers = Bundle("callers")

    @initialize(max_batch=st.integers(1, 5), max_items=st.integers(8, 40), max_bytes=st.integers(24, 120))
    def begin(self, max_batch, max_items, max_bytes):
        self.loop = asyncio.new_event_loop()
        self.mishaps = []  # what a callback raised, such as a future that was ended twice
        self.loop.set_exception_handler(lambda _, context: self.mishaps.append(context))
        self.now, self.mode, self.closed, self.known = 0.0, GOOD, False, []
        self.max_batch, self.max_items, self.max_bytes = max_batch, max_items, max_bytes
        self.worker = Worker(self)
        self.started = 0.0  # the present batch
        self.seconds = self.done = 0.0  # of those that ran, the newest counting most
        self.seen = []  # sizes of the batches, as told to those who count

        async def make():
            return MicroBatcher(
                self.model,
                max_batch=max_batch,
                max_wait_seconds=MAX_WAIT_SECONDS,
                max_pending_items=max_items,
                max_pending_bytes=max_bytes,
                on_batch=lambda run: self.seen.append(len(run.items)),
                worker=self.worker,
                clock=lambda: self.now,
            )

        self.batcher = self.loop.run_until_complete(make())

    def model(self, items):
        assert 1 <= len(items) <= self.max_batch
        if any(poison for _, _, poison in items) or (self.mode == FRAGILE and len(items) > 1):
            raise RuntimeError("poison")
        answers = [("answer", *item) for item in items]
        return answers[1:] if self.mode == FORGETFUL and len(items) > 1 else answers

    @rule(
        target=callers,
        size=st.integers(1, 9),
        poison=st.sets(st.integers(0, 8), max_size=2),
        left=st.none() | st.integers(-1, 60),
    )
    def submit(self, size, poison, left):
        caller = Caller(len(self.known), size, poison, None if left is None else self.now + left)
        caller.task = self.loop.create_task(self.call(caller))
        self.known.append(caller)
        return caller

    async def call(self, caller):
        with self.batcher.admit(len(caller.items), len(caller.items) * BYTES_EACH, caller.deadline):
            caller.arrived = self.now
            return await self.batcher.submit(caller.items, caller.deadline)

    @rule(caller=callers)
    def cancel(self, caller):
        if caller.task.cancel():
            caller.cancelled = True

    @rule(turns=st.integers(1, 4))
    def let_the_loop_turn(self, turns):
        for _ in range(turns):
            self.loop.run_until_complete(asyncio.sleep(0))

    @rule(seconds=st.sampled_from([0.5, 5.0, 25.0]))
    def advance(self, seconds):
        self.now += seconds

    @precondition(lambda self: self.worker.held is not None)
    @rule(mode=st.sampled_from([GOOD, FRAGILE, FORGETFUL]))
    def model_finishes(self, mode):
        self.mode = mode
        self.finish()
        self.let_the_loop_turn(1)

    def finish(self):
        work, done = self.worker.held
        self.worker.held = None
        self.seconds = (1 - NEWEST_WEIGHT) * self.seconds + NEWEST_WEIGHT * (self.now - self.started)
        self.done = (1 - NEWEST_WEIGHT) * self.done + NEWEST_WEIGHT * len(work.args[0].items)
        self.loop.call_soon(done, work())

    @precondition(lambda self: self.worker.held is not None)
    @rule(which=st.integers(0, 8))
    def a_caller_whose_items_run_leaves(self, which):
        work, _ = self.worker.held
        numbers = sorted({number for number, _, _ in work.args[0].items})
        self.cancel(self.known[numbers[which % len(numbers)]])

    @precondition(lambda self: self.worker.held is not None)
    @rule(caller=callers)
    def model_finishes_and_a_caller_leaves_in_the_same_turn(self, caller):
        self.mode = GOOD
        self.finish()
        self.cancel(caller)
        self.let_the_loop_turn(1)

    @precondition(lambda self: len(self.known) > 12)
    @rule()
    def close(self):
        self.loop.run_until_complete(self.batcher.close())
        self.closed = True

    def check_start(self, items):
        """A batch starts: nobody in it is late or gone, and nobody who is left out should have gone before."""
        running = []
        for number, position, _ in items:
            caller = self.known[number]
            assert position == caller.taken, "out of order, twice or left out"
            caller.taken += 1
            if caller not in running:
                running.append(caller)
        assert not any(caller.cancelled for caller in running), "cancelled"
        assert all(urgency(caller) > self.now for caller in running), "expired"
        left_out = [caller for caller in self.known if caller.waits and urgency(caller) > self.now]
        for caller in left_out:
            left = len(caller.items) - caller.taken
            caller.hopeless = bool(self.done) and self.now + left * self.seconds / self.done >= urgency(caller)
        # Whoever would be too late even now may have been told so.
        left_out = [caller for caller in left_out if not caller.hopeless]
        self.started = self.now
        if left_out:
            assert len(items) == self.max_batch, "room was left while others wait"
        oldest = min([*running, *left_out], key=lambda caller: caller.number)
        if self.now - oldest.arrived >= MAX_WAIT_SECONDS:
            assert oldest in running, "who has waited longest was passed over"
        first, *rest = running
        aged = self.now - first.arrived >= MAX_WAIT_SECONDS and all(first.number <= other.number for other in left_out)
        ordered = rest if aged else running
        for caller in ordered:
            assert all(urgency(caller) <= urgency(other) for other in left_out), "a later deadline went first"

    @invariant()
    def nothing_went_wrong_in_a_callback(self):
        assert not self.mishaps, self.mishaps

    @invariant()
    def room_is_bounded_and_counted(self):
        assert 0 <= self.batcher.pending_items <= self.max_items

    def teardown(self):
        if not hasattr(self, "loop"):
            return
        try:
            self.check_all_ends()
        finally:
            for caller in self.known:
                caller.task.cancel()
            self.let_the_loop_turn(3)
            self.loop.close()

    def check_all_ends(self):
        for _ in range(2000):
            self.let_the_loop_turn(1)
            if self.worker.held is not None:
                self.model_finishes(GOOD)
            elif all(caller.task.done() for caller in self.known):
                break
        for caller in self.known:
            self.check_end(caller)
        assert self.batcher.pending_items == 0
        assert self.batcher.running_seconds == 0.0
        if not self.closed:
            with self.batcher.admit(self.max_items, self.max_bytes):
                pass
        self.let_the_loop_turn(2)
        assert not self.mishaps, self.mishaps

    def check_end(self, caller):
        assert caller.task.done(), "somebody waits for ever"
        if caller.task.cancelled():
            assert caller.cancelled
            return
        error = caller.task.exception()
        if error is None:
            expected = ["failed" if poison else ("answer", number, at, poison) for number, at, poison in caller.items]
            answers = caller.task.result()
            assert ["failed" if isinstance(answer, RuntimeError) else answer for answer in answers] == expected
            assert caller.taken == len(caller.items)
        elif isinstance(error, ExpiredError):
            assert caller.hopeless or urgency(caller) <= self.now
            assert caller.taken < len(caller.items), "run to the end and yet expired"
        elif isinstance(error, UnavailableError):
            assert self.closed
        else:
            assert isinstance(error, OverloadedError)
            assert caller.arrived is None
            assert caller.taken == 0


def urgency(caller):
    return math.inf if caller.deadline is None else caller.deadline


TestBatching = Batching.TestCase
TestBatching.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, report_multiple_bugs=False)
