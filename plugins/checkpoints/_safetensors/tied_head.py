"""Whether a checkpoint that says its output head is tied stores another one.

Such files exist: fine-tuning untied the head and left config.json as it was. transformers then
serves the stored head, and so do we.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

from core.disk.plain_files import open_plain
from core.errors import ModelError
from plugins.checkpoints._safetensors.header import ITEM_BYTES, StoredTensor

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_CHUNK_BYTES = 8 << 20


def stored_head_differs(files: Mapping[Path, Mapping[str, StoredTensor]]) -> bool:
    """Whether there is a head beside the embedding, of the same shape, that is not a copy of it.
    Reads both where they are the same; of others mostly their first chunk."""
    places = {
        name: (path, tensors[name])
        for path, tensors in files.items()
        for name in (HEAD, EMBEDDING)
        if name in tensors
    }
    if len(places) < 2:
        return False
    (head_path, head), (embedding_path, embedding) = places[HEAD], places[EMBEDDING]
    if head.shape != embedding.shape:
        return False  # no head of this model: the check of all tensors says what is wrong
    if head.dtype != embedding.dtype:
        return True
    num_bytes = math.prod(head.shape) * ITEM_BYTES[head.dtype]
    ours, theirs = open_plain(head_path), open_plain(embedding_path)
    try:
        for at in range(0, num_bytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, num_bytes - at)
            one = os.pread(ours, size, head.start + at)
            if one != os.pread(theirs, size, embedding.start + at):
                return True
        return False
    except OSError as error:
        raise ModelError(f"can't read {head_path} or {embedding_path}: {error.strerror}") from error
    finally:
        os.close(ours)
        os.close(theirs)
