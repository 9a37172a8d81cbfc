"""What was measured on this machine, kept in files: which backend, tile or level was fastest for an op at a shape."""
