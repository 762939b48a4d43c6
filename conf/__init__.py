"""Hydra configs: config.yaml and a folder for each group. A package, so that wheels carry them."""
