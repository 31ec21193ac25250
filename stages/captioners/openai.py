"""Captions from servers that speak the chat-completions API with images: vLLM, SGLang, llama.cpp, TGI, hosted ones."""

from collections.abc import Callable
from typing import Literal

from stages.captioners.base import Captioner
from stages.captioners.budget import Budget, Used
from stages.captioners.server import ServerCaptioner
from stages.captioners.server_config import ServerCaptionerConfig


class OpenaiCaptionerConfig(ServerCaptionerConfig):
    """One or more servers of one model."""

    kind: Literal["openai"] = "openai"

    def start(self, usage: Callable[[], Used]) -> Captioner:
        budget = Budget(self.name, self.max_tokens, self.max_requests, self.max_cost, self.price_per_million, usage)
        return ServerCaptioner(self, self.key(), budget)
