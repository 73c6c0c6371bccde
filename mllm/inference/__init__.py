"""Messages in, text out."""

from mllm.inference.conversation import Chat, generate_answers
from mllm.inference.limits import MediaLimits

__all__ = ["Chat", "MediaLimits", "generate_answers"]
