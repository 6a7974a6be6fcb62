"""The gRPC server: images arrive, are decoded and batched, and leave with a verdict."""
