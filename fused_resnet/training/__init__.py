"""Training runs: bundled data, models trained side by side, and the demo made of them."""
