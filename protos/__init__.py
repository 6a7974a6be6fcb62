"""The gRPC contracts and the code generated from them (`python -m protos.generate`)."""
