"""What can go wrong between an image and its verdict, and whose fault it is.

DetectorError
├── ImageError         the image cannot be scored                      (caller)
├── RequestError       an argument is outside what the function takes  (caller)
├── DataError          a data set cannot be read                       (operator)
├── TrainingError      training cannot start, go on or be resumed      (operator)
├── ArtifactError      a saved bundle cannot be used                   (operator)
├── EngineError        an engine cannot run a network, or not here     (operator)
└── PathShapeError     paths, or gate inputs, and widths disagree      (us)
"""


class DetectorError(Exception):
    """Base of every error that Pathguard raises on purpose; its text is one line for a person."""


class ImageError(DetectorError):
    """The image cannot be scored: damaged, of a wrong kind, or of a wrong size."""


class RequestError(DetectorError):
    """An argument is outside what the function takes; the message names the range or the choices."""


class DataError(DetectorError):
    """A data set is missing, damaged or empty."""


class TrainingError(DetectorError):
    """Training cannot start, go on or be resumed; the last good checkpoint is untouched."""


class ArtifactError(DetectorError):
    """A saved bundle is incomplete, altered, or from another version."""


class EngineError(DetectorError):
    """An engine is not installed, or does not know a part of the network; another one may."""


class PathShapeError(DetectorError):
    """A path encoding, or what gates read, and the widths that describe it disagree."""
