"""Hydra configs of this plugin; a package, so that the wheel carries them."""
