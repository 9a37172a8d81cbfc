"""Measuring which backend, tile and level is fastest here for the shapes of a network, and keeping the answers."""
