"""What the server remembers and tells of its work: metrics, logs, the audit log, drift, suspicious queries."""
