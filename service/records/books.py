"""What is written down of every answered call, whatever its protocol: metrics, the audit log, drift, query watch.

Metrics are counted on the event loop, cheaply. The audit log is waited for, so that no answer leaves that it does not
know. Drift and query watch follow in a thread of their own and may leave images out when there are too many.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from prometheus_client import Counter

from detector.images import Pixels
from service.access.callers import Caller, caller
from service.config import ServiceConfig
from service.model import Answer, Model
from service.records.audit import AuditLog
from service.records.background import Background
from service.records.drift import DriftCheck
from service.records.logs import request_id
from service.records.query_watch import QueryWatch
from service.records.telemetry import Metrics
from service.ui.recent import RecentVerdicts

_log = logging.getLogger(__name__)

_MOST_WINDOWS: Final = 64


@dataclass(frozen=True, slots=True)
class Answered:
    """One call's images and what was said about them.

    Attributes:
        model: who answered.
        rate: the rate that the verdicts were given at, in (0, 1).
        images: the pixels of each image that was decoded, `(height, width, channels)`.
        answers: for each of these the answer, or the error in its place.
        undecoded: images of the call that could not be decoded.
    """

    model: Model
    rate: float
    images: Sequence[Pixels]
    answers: Sequence[Answer | BaseException]
    undecoded: int = 0


class Books:
    """Writes down what was answered. For the event loop's thread.

    Attributes:
        recent: the last verdicts, for the page; empty where there is no page.
    """

    def __init__(self, config: ServiceConfig, metrics: Metrics) -> None:
        """Opens the audit log, if there shall be one; needs a running event loop.

        Raises:
            ConfigError: the audit log cannot be written.
        """
        self._metrics = metrics
        self._verdicts = _Verdicts(metrics)
        self.recent = RecentVerdicts()
        self._watched = config.ui.port is not None
        self._audit = (
            AuditLog(config.audit, lambda outcome: metrics.audited.labels(outcome).inc()) if config.audit.file else None
        )
        watch, drift = config.query_watch, config.drift
        self._watcher = (
            _Watcher(
                metrics,
                drift.window_images,
                drift.level,
                QueryWatch(watch.memory_images, watch.max_clients, watch.distance, watch.neighbours)
                if watch.memory_images
                else None,
            )
            if watch.memory_images or drift.window_images
            else None
        )

    async def write(self, answered: Answered) -> None:
        """Writes down one call; returns when the audit log has it, or could not have it. Never fails."""
        self._verdicts.count(answered)
        if self._watched:
            for answer in answered.answers:
                if isinstance(answer, Answer):
                    name = answered.model.class_names[answer.label]
                    self.recent.add("call", name, answer.p_value, answer.p_value <= answered.rate)
        if self._watcher is not None:
            self._watcher.offer(answered, caller().name)
        if self._audit is not None:
            record = _AuditRecord(answered, caller(), request_id(), datetime.now(UTC))
            await self._audit.write(record, sum(image.nbytes for image in answered.images))

    def close(self) -> None:
        """Finishes what waits, for some seconds."""
        if self._watcher is not None:
            self._watcher.close()
        if self._audit is not None:
            self._audit.close()


class _Verdicts:
    """Counts verdicts, scores and p-values."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counters: dict[tuple[str, str], tuple[Counter, Counter, Counter]] = {}

    def count(self, answered: Answered) -> None:
        model, rate = answered.model, answered.rate
        good = [answer for answer in answered.answers if isinstance(answer, Answer)]
        p_values = [answer.p_value for answer in good]
        adversarial = sum(p_value <= rate for p_value in p_values)
        failed = len(answered.answers) - len(good) + answered.undecoded
        flagged, clean, none = self._counters_of(model)
        for counter, count in ((flagged, adversarial), (clean, len(good) - adversarial), (none, failed)):
            if count:
                counter.inc(count)
        self._metrics.scores.observe(model.name, [answer.score for answer in good])
        self._metrics.p_values.observe(model.name, p_values)

    def _counters_of(self, model: Model) -> tuple[Counter, Counter, Counter]:
        """Those of a model, looked up once; forgotten now and then, for models come and go."""
        key = (model.name, model.model_version)
        if key not in self._counters:
            if len(self._counters) >= _MOST_WINDOWS:
                self._counters.clear()
            adversarial, clean, none = (
                self._metrics.verdicts.labels(*key, verdict) for verdict in ("adversarial", "clean", "none")
            )
            self._counters[key] = (adversarial, clean, none)
        return self._counters[key]


@dataclass(frozen=True, slots=True)
class _AuditRecord:
    """Makes the line of one call, in the audit log's thread."""

    answered: Answered
    caller: Caller
    request_id: str
    time: datetime

    def __call__(self) -> Mapping[str, Any]:
        answered, model = self.answered, self.answered.model
        return {
            "time": self.time.isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "caller": self.caller.name,
            "role": self.caller.role.name,
            "model": model.name,
            "model_version": model.model_version,
            "threshold_version": model.threshold_version,
            "max_false_alarm_rate": answered.rate,
            "undecoded": answered.undecoded,
            "images": [
                self._image(pixels, answer) for pixels, answer in zip(answered.images, answered.answers, strict=True)
            ],
        }

    def _image(self, pixels: Pixels, answer: Answer | BaseException) -> Mapping[str, Any]:
        digest = {"sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
        if isinstance(answer, BaseException):
            return {**digest, "error": type(answer).__name__}
        return {
            **digest,
            "label": answer.label,
            "score": answer.score,
            "p_value": answer.p_value,
            "verdict": "adversarial" if answer.p_value <= self.answered.rate else "clean",
        }


class _Watcher:
    """Drift and query watch, in a thread of their own."""

    def __init__(self, metrics: Metrics, window_images: int, level: float, queries: QueryWatch | None) -> None:
        self._metrics = metrics
        self._window_images = window_images
        self._level = level
        self._queries = queries
        self._drift: dict[tuple[str, str, str], DriftCheck] = {}
        self._background = Background("watch")

    def offer(self, answered: Answered, client: str) -> None:
        held = sum(image.nbytes for image in answered.images) if self._queries is not None else 0
        if not self._background.offer(lambda: self._watch(answered, client), held):
            self._metrics.unwatched.inc(len(answered.images))

    def close(self) -> None:
        self._background.close()

    def _watch(self, answered: Answered, client: str) -> None:
        if self._window_images:
            self._judge(answered)
        if self._queries is not None:
            for pixels in answered.images:
                if self._queries.sees(client, pixels):
                    self._metrics.query_alarms.inc()
                    _log.warning("many near-identical images from one client", extra={"fields": {"client": client}})
            self._metrics.watched.set(len(self._queries))

    def _judge(self, answered: Answered) -> None:
        model = answered.model
        p_values = np.array([answer.p_value for answer in answered.answers if isinstance(answer, Answer)])
        # Each network with its calibration has a window of its own; of those long out of service none is kept.
        key = (model.name, model.model_version, model.threshold_version)
        check = self._drift.pop(key, None) or DriftCheck(self._window_images)
        self._drift[key] = check
        if len(self._drift) > _MOST_WINDOWS:
            del self._drift[next(iter(self._drift))]
        for window in check.add(p_values, model.max_false_alarm_rate, model.calibration_images):
            self._metrics.flagged.labels(model.name).set(window.flagged)
            for test, probability in window.probability.items():
                self._metrics.drift.labels(model.name, test).set(probability)
                if probability < self._level:
                    self._metrics.drift_alarms.labels(model.name, test).inc()
                    fields = {
                        "model": model.name,
                        "test": test,
                        "probability": probability,
                        "flagged_share": window.flagged,
                        "max_false_alarm_rate": model.max_false_alarm_rate,
                    }
                    _log.warning("images in service are unlike those of the calibration", extra={"fields": fields})
