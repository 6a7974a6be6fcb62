"""Takes changed bundles into service while the server runs: verified and warmed first, then swapped in at once.

A request holds the model that it was given, so that whatever is under way ends with the model it began with. A bundle
that is damaged, does not answer, or takes too long is refused: metric and log say so, what is in service goes on, and
the folder is tried again when it changes. A folder that is still being written is left alone until it rests.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from detector.errors import ArtifactError
from service.config import ModelsConfig
from service.errors import ConfigError, SettingsFileError
from service.model import Model, smallest_false_alarm_rate
from service.models.registry import Registry, ServedModel, age_of, at_rate, served
from service.models.repository import FoundModel, FoundVersion, Mark, ModelSettings, Repository
from service.records.telemetry import Metrics
from service.threads import in_thread

_log = logging.getLogger(__name__)

Load = Callable[[FoundVersion, str], Model]
"""Makes a model of a bundle, under a name; raises whatever a broken bundle makes it raise."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A version in service, and how its folder looked when it was read."""

    mark: Mark
    entry: ServedModel


class Keeper:
    """Brings what a repository holds into a registry, once and then again and again. For the event loop's thread."""

    def __init__(
        self,
        repository: Repository,
        load: Load,
        check: Callable[[Model], None],
        registry: Registry,
        config: ModelsConfig,
        metrics: Metrics,
    ) -> None:
        """Looks at nothing yet.

        Args:
            repository: where the bundles are.
            load: makes a model of one, in a thread beside the loop.
            check: warms a model up, in that thread, and raises if it cannot be served.
            registry: where the models in service stand.
            config: how many versions, how often, how long.
            metrics: told what became of each bundle.
        """
        self._repository = repository
        self._load = load
        self._check = check
        self._registry = registry
        self._config = config
        self._metrics = metrics
        self._kept: dict[str, dict[str, _Kept]] = {}
        self._settings: dict[str, ModelSettings] = {}
        self._seen: dict[tuple[str, str], Mark] = {}
        self._refused: dict[tuple[str, str], Mark] = {}
        self._gone: set[str] = set()
        self._told: dict[str, str] = {}

    async def begin(self) -> None:
        """Brings in all there is.

        Raises:
            ArtifactError: a bundle that was named by itself cannot be used, or none in the folder of models can.
            SettingsFileError: a `serving.json` cannot be understood.
            ConfigError: the folder of models cannot be read, or has no model of the default's name.
            Exception: whatever else loading or warming raised.
        """
        try:
            found = await in_thread(self._repository.scan, self._config.load_seconds)
        except OSError as error:
            raise ConfigError(f"expected a folder of models, got {_why(error)}") from None
        errors: list[Exception] = []
        for model in found:
            if isinstance(model.settings, SettingsFileError):
                raise model.settings
            before = len(errors)
            await self._bring(model, errors, at_start=True)
            if model.required and len(errors) > before:
                raise errors[before]
            if wrong := self._wrong_in(model, model.settings):
                raise SettingsFileError(wrong)
        names = self._registry.names()
        if not names:
            raise errors[0] if errors else ArtifactError("expected a bundle in the folder of models, got none")
        if self._config.default and self._config.default not in names:
            raise ConfigError(f"expected models_default of {', '.join(names)}, got {self._config.default!r}")

    async def keep(self) -> None:
        """Looks again every `poll_seconds`, for ever; returns at once where that is 0."""
        while self._config.poll_seconds:
            await asyncio.sleep(self._config.poll_seconds)
            try:
                await self.look()
            except Exception:
                # Whatever it is, it must not end the looking.
                _log.exception("the folders of models could not be looked at")

    async def look(self) -> None:
        """Brings in what has changed and rests."""
        try:
            found = await in_thread(self._repository.scan, self._config.load_seconds)
        except OSError as error:
            self._tell("", f"the models go on as they are: {_why(error)}")
            return
        self._told.pop("", None)
        for model in found:
            if model.versions is not None:
                await self._bring(model, [], at_start=False)
        # A model whose folder is gone leaves, but not before the second look, for it may be on its way to another
        # place, and never the last one: then it is more likely a disk that is away.
        there = {model.name for model in found if model.versions is None or model.versions}
        gone = self._kept.keys() - there
        for name in gone & self._gone:
            if there & self._kept.keys():
                self._leave(name)
        self._gone = gone

    async def _bring(self, model: FoundModel, errors: list[Exception], *, at_start: bool) -> None:
        """Makes the newest usable versions of a model, and the pinned one, those in service."""
        settings = self._settings_of(model)
        kept = self._kept.get(model.name, {})
        chosen: dict[str, _Kept] = {}
        newest_first = sorted(model.versions or (), key=lambda found: age_of(found.version), reverse=True)
        if at_start and model.required and not newest_first:
            newest_first = [FoundVersion("", model.folder, ())]  # loading it says what is missing
        pinned = [found for found in newest_first if found.version == settings.version]
        for found in [*pinned, *(found for found in newest_first if found not in pinned)]:
            if len(chosen) >= self._config.keep_versions + len(pinned):
                break
            entry = kept.get(found.version)
            if (entry is None or entry.mark != found.mark) and (at_start or self._rests(model.name, found)):
                entry = await self._taken(model.name, found, errors) or entry
            if entry is not None:
                chosen[found.version] = entry
        self._metrics.refused_models.labels(model.name).set(
            any(self._refused.get((model.name, found.version)) == found.mark for found in newest_first)
        )
        if chosen or kept:
            self._kept[model.name] = chosen or kept
            self._show(model, settings)

    async def _taken(self, name: str, found: FoundVersion, errors: list[Exception]) -> _Kept | None:
        """A bundle, loaded and warm; None where it is refused."""

        def load() -> Model:
            model = self._load(found, name)
            self._check(model)
            return model

        shown = f"{name} {found.version}".strip()
        try:
            model = await in_thread(load, self._config.load_seconds)
        except Exception as error:
            self._refused[name, found.version] = found.mark
            self._metrics.loads.labels(name, "refused").inc()
            known = isinstance(error, ArtifactError | ConfigError)
            reason = str(error) or f"it was not ready after {self._config.load_seconds:g} s"
            _log.error("model %s in %s is refused: %s", shown, found.folder, reason, exc_info=None if known else error)
            errors.append(error)
            return None
        self._refused.pop((name, found.version), None)
        self._metrics.loads.labels(name, "taken").inc()
        _log.info(
            "model %s in %s is in service, digest %s, engine %s", shown, found.folder, model.model_version, model.engine
        )
        return _Kept(found.mark, served(model, name, found.version or None))

    def _rests(self, name: str, found: FoundVersion) -> bool:
        """Whether a folder is as it was at the last look, and is not one that was refused as it is."""
        before = self._seen.get((name, found.version))
        self._seen[name, found.version] = found.mark
        return before == found.mark and self._refused.get((name, found.version)) != found.mark

    def _settings_of(self, model: FoundModel) -> ModelSettings:
        """The operator's word on a model, or the last one that could be understood."""
        last = self._settings.get(model.name, ModelSettings())
        if isinstance(model.settings, SettingsFileError):
            self._tell(model.name, f"the last good settings of {model.name} go on: {model.settings}")
            return last
        return model.settings

    def _wrong_in(self, model: FoundModel, settings: ModelSettings) -> str:
        """What the operator asks for and the model cannot do; empty if nothing."""
        kept = self._kept.get(model.name, {})
        if kept and settings.version is not None and settings.version not in kept:
            return (
                f"expected a version of {model.name} that can be used ({', '.join(kept)}), got {settings.version!r} in "
                f"{model.folder / 'serving.json'}"
            )
        smallest = max((smallest_false_alarm_rate(entry.entry) for entry in kept.values()), default=0.0)
        if settings.max_false_alarm_rate is not None and settings.max_false_alarm_rate < smallest:
            return (
                f"expected a max_false_alarm_rate of at least {smallest:.6g} in {model.folder / 'serving.json'}, got "
                f"{settings.max_false_alarm_rate:g}"
            )
        return ""

    def _show(self, model: FoundModel, settings: ModelSettings) -> None:
        """Puts the kept versions into the registry, at the operator's rate."""
        if wrong := self._wrong_in(model, settings):
            self._tell(model.name, f"the last good settings of {model.name} go on: {wrong}")
            settings = self._settings.get(model.name, ModelSettings())
        elif not isinstance(model.settings, SettingsFileError):
            self._told.pop(model.name, None)
        self._settings[model.name] = settings
        kept = self._kept[model.name]
        current = settings.version if settings.version in kept else max(kept, key=age_of)
        entries = {version: at_rate(entry.entry, settings.max_false_alarm_rate) for version, entry in kept.items()}
        self._put(model.name, entries, current)

    def _put(self, name: str, entries: Mapping[str, ServedModel], current: str) -> None:
        before = self._registry.versions(name)
        after = {entry.version: entry for entry in entries.values()}
        now = entries[current].version
        if dict(before) == after and self._registry.current(name) == now:
            return
        self._registry.put(name, after, now)
        if before:
            _log.info("model %s answers with version %s, at a rate of %g", name, now, after[now].max_false_alarm_rate)
        self._count()

    def _leave(self, name: str) -> None:
        del self._kept[name]
        self._settings.pop(name, None)
        self._registry.put(name, {}, "")
        _log.info("model %s left", name)
        self._count()

    def _count(self) -> None:
        show_models(self._registry.all(), self._metrics)

    def _tell(self, about: str, what: str) -> None:
        """Says something once, until something else is to be said about it."""
        if self._told.get(about) != what:
            self._told[about] = what
            _log.error("%s", what)
            self._metrics.loads.labels(about or "all", "refused").inc()


def _why(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "a disk that does not answer"
    return f"{error.filename}: {error.strerror}"


def show_models(models: Sequence[ServedModel], metrics: Metrics) -> None:
    """Tells the metrics which models are in service."""
    metrics.models.clear()
    metrics.rates.clear()
    for model in models:
        metrics.models.labels(model.name, model.version, model.model_version, model.threshold_version).set(1)
        metrics.rates.labels(model.name, model.version).set(model.max_false_alarm_rate)
