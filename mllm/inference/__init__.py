"""Messages in, text out."""

from mllm.inference.conversation import Chat, generate_answers

__all__ = ["Chat", "generate_answers"]
