"""Version 1 of Pathguard's contract: `pathguard.v1.DetectionService`."""
