"""Conversations as documents whose prompts are masked from the loss."""

from __future__ import annotations

from typing import Any

from kvlab.platform.data.documents import DataError, Document, Segment


def conversation(messages: Any, where: str) -> Document:
    """Turn messages into a document: what the assistant says counts, all else is context.

    A turn is written `<|role|>` and a line break, its content, and a line break; the assistant's
    content and the line break that closes it are what the model learns to say.

    Args:
        messages: [{"role": str, "content": str}, ...].
        where: file and line, or data set and row, for errors.

    Raises:
        DataError: the messages are not of that form.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: `messages` must be a list of {{role, content}}, found {messages!r:.60}"
        )
    document = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f"{where}: message {index} must have text under `role` and `content`, "
                f"found {message!r:.60}"
            )
        said = message["role"] == "assistant"
        document += [
            Segment(f"<|{message['role']}|>\n", counts=False),
            Segment(f"{message['content']}\n", counts=said),
        ]
    return tuple(document)
