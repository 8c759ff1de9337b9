"""Files, folders, JSON lines, the hub, redaction of secrets."""
