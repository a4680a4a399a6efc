"""Which documents are held out: decided by their content, so never by order or luck."""

from __future__ import annotations

from hashlib import sha256

from kvlab.platform.data.documents import Document


def place(document: Document) -> float:
    """Return the document's place in [0, 1), uniform over contents; equal texts share it."""
    digest = sha256("\0".join(segment.text for segment in document).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out(document: Document, share: float) -> bool:
    """Say whether a document belongs to the held-out part, about `share` of all."""
    return place(document) < share
