"""Hydra configs of this plugin, found through its config_searchpath hook."""
