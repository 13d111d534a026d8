"""The parameters of requests. Unknown ones are ignored; those that would change the answer are refused."""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chat import Sampling
from serving.guard import Refusal

# parameters of OpenAI and others that are not supported, and the values that ask for nothing
NEUTRAL = {
    'best_of': 1, 'echo': False, 'suffix': '', 'presence_penalty': 0, 'frequency_penalty': 0,
    'logit_bias': {}, 'tools': [], 'functions': [], 'response_format': {'type': 'text'}, 'min_p': 0,
}
ROLES = {'developer': 'system', 'tool': 'context'}  # others have the name of ours

DRAWING = {'temperature': 0.8, 'top_k': 200, 'top_p': None}  # for requests that do not say, as sample.py's
UNLIMITED = 2**31
# fail_fast: listing every wrong item of a long list would take seconds
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Shared(BaseModel):
    model_config = ConfigDict(strict=True, extra='allow')  # strict: the text '1' is no number

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # 0 = all
    seed: Annotated[int, Field(ge=-2**63, lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @classmethod
    def parse(cls, body: bytes):
        """Return the parameters in the body of a request, or raise Refusal."""
        try:
            request = cls.model_validate(json.loads(body))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            param, *_ = *first['loc'], None
            raise Refusal(400, f'{param or "the body"}: {first["msg"]}', param) from None
        except (ValueError, RecursionError):
            raise Refusal(400, 'the body is not JSON') from None
        for name, neutral in NEUTRAL.items():
            if request.model_extra.get(name) not in (None, neutral):
                raise Refusal(400, f'{name} is not supported: leave it out', name, 'unsupported_parameter')
        return request

    def stops(self) -> list[str]:
        stops = self.stop or []
        if isinstance(stops, str):
            stops = [stops]
        return [stop for stop in stops if stop]

    def sampling(self, max_new_tokens: int, seed: int) -> Sampling:
        given = self.model_dump(include={'temperature', 'top_k', 'top_p'}, exclude_none=True)
        return Sampling(max_new_tokens=max_new_tokens, seed=seed, **DRAWING | given)


class CompletionRequest(Shared):
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(max_length=4096, fail_fast=True)] | None = ''
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list:
        prompt = self.prompt or ''
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt

    def max_new_tokens(self) -> int:
        return self.max_tokens or 16  # OpenAI's default

    def n_logprobs(self) -> int | None:
        return self.logprobs


class Part(BaseModel):
    type: Literal['text']
    text: str


class Message(BaseModel):
    role: Literal['system', 'developer', 'user', 'assistant', 'tool']
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None


class ChatRequest(Shared):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def max_new_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or UNLIMITED

    def n_logprobs(self) -> int | None:
        if not self.logprobs:
            return None
        return self.top_logprobs or 0

    def prompts(self) -> list:
        """Return one prompt: (role, text) of each message, as the chat template of an export writes them."""
        turns = []
        for message in self.messages:
            content = message.content or ''
            if isinstance(content, list):
                content = ''.join(part.text for part in content)
            text = content.replace('\r\n', '\n').replace('\r', '\n').strip()
            turns.append((ROLES.get(message.role, message.role), text))
        if turns[-1][0] == 'assistant':
            raise Refusal(400, 'messages: the last one is an answer: end with a question', 'messages')
        return [turns]
