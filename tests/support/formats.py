"""The built-in formats of checkpoints, as whoever finds or opens a model's files is given them."""

from core.plugin.plugin_manager import PluginManager

FORMATS = PluginManager.load(builtins=["plugins.checkpoints"]).table("checkpoint_format")
