"""Short chat templates, written for these tests, each in the manner of one family: what it does
with content that is not there, with arguments and with roles is that family's way, its tags are
ours. `parts-only` reads lists of parts alone, as templates of models that see images may."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "chat_templates"
MANNERS = {path.stem: path.read_text("utf-8") for path in sorted(_FOLDER.glob("*.jinja"))}
