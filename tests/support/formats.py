"""The built-in plugins that find and open a model's files, as whoever does that is given them."""

from core.plugin.plugin_manager import PluginManager

FILE_PLUGINS = PluginManager.load(builtins=["plugins.checkpoints", "plugins.tokenizers"])
FORMATS = FILE_PLUGINS.table("checkpoint_format")
