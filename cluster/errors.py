"""What can go wrong between this process and a cluster.

ClusterError        Ray is not installed, does not answer, is another version, or has no room   (operator)
"""

from detector.errors import DetectorError


class ClusterError(DetectorError):
    """A cluster cannot be used; the message says in one line what was expected of it and what came."""
