"""The backends: each exports functions named as in ``ops/reference/``, with the same meaning."""
