"""OpenAI's HTTP API over an Engine, and the chat page.

    GET  /                       page.html
    GET  /v1/models              also tells `context` (tokens) and `chat` (whether it has a template)
    POST /v1/completions
    POST /v1/chat/completions

Errors have OpenAI's shape, {"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import secrets
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response, StreamingResponse

from chat import json_line
from corpus.template import Template
from serving.engine import Engine, Sequence
from serving.guard import Guard, Refusal, as_response, failure, read_body
from serving.schema import ChatRequest, CompletionRequest
from tokens.tokenizer import opening

PAGE = Path(__file__).with_name('page.html')


@dataclass
class Api:
    """The routes."""
    engine: Engine
    name: str  # the model's id
    style: str  # prompt template; '' = a base model, which does not chat
    stop_ids: set

    def __post_init__(self):
        self.created = int(time.time())
        self.context = self.engine.model.config.block_size
        self.tokenizer = self.engine.tokenizer
        self.html = PAGE.read_text(encoding='utf-8')

    async def page(self) -> Response:
        # a policy within the page cannot say that no other site may frame it
        headers = {'content-security-policy': "frame-ancestors 'none'"}
        return Response(self.html, media_type='text/html', headers=headers)

    async def models(self) -> Response:
        model = {'id': self.name, 'object': 'model', 'created': self.created, 'owned_by': 'flatgpt',
                 'context': self.context, 'chat': bool(self.style)}
        return as_response({'object': 'list', 'data': [model]})

    async def completions(self, request: Request) -> Response:
        return await self.answer(request, CompletionRequest, self.encode_prompt, TextAnswer)

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, ChatRequest, self.encode_turns, ChatAnswer)

    async def answer(self, request, schema, encode, kind) -> Response:
        """Queue the sequences of a request, and return the response that waits for them."""
        body = schema.parse(await read_body(request))
        if body.model not in (None, self.name):
            raise Refusal(404, f'the model {body.model!r} does not exist here, {self.name!r} does', 'model',
                          'model_not_found')
        prompts, n = body.prompts(), body.n or 1
        most = self.engine.max_batch + self.engine.max_queue
        if len(prompts) * n > most:
            raise Refusal(400, f'{len(prompts) * n} answers at once: this server takes at most {most}',
                          'n' if n > 1 else kind.param)
        try:
            prompts = await asyncio.to_thread(lambda: [encode(prompt) for prompt in prompts])
        except (ValueError, OverflowError) as error:
            raise Refusal(400, str(error), kind.param) from None
        longest = max(map(len, prompts))
        if longest >= self.context:
            raise Refusal(400, f"the prompt has {longest} tokens; the model's context of {self.context} "
                          'tokens holds prompt and answer: shorten it', kind.param, 'context_length_exceeded')
        answer = kind(self, body, prompts)
        if not self.engine.submit(answer.sequences):
            raise Refusal(429, 'the queue is full: try again later', None, 'queue_full')
        return answer

    def encode_prompt(self, prompt) -> list[int]:
        if not prompt:
            return opening(self.tokenizer)
        if isinstance(prompt, list):
            return self.tokenizer.checked(prompt)
        text = prompt.replace('\r\n', '\n')  # as corpora are read
        return self.tokenizer.prefix + self.tokenizer.encode(text, allowed_special={'<|endoftext|>'})

    def encode_turns(self, turns) -> list[int]:
        if not self.style:
            raise Refusal(400, 'the model was not tuned on conversations: use /v1/completions, or tune it, '
                          'for example by config/finetune_dolly.py', 'messages')
        return Template(self.tokenizer, self.style).encode([*turns, ('assistant', None)])[0]


class Answer(Response):
    """The response to a request for text: whole, or as server-sent events while it is generated."""
    first_delta = None  # of a stream

    def __init__(self, api, body, prompts):
        super().__init__()
        self.tokenizer, self.body, self.n_prompt_tokens = api.tokenizer, body, sum(map(len, prompts))
        self.loop, self.pieces = asyncio.get_running_loop(), asyncio.Queue()
        self.head = {'id': f'{self.prefix}-{secrets.token_hex(12)}', 'created': int(time.time()),
                     'model': api.name}
        seed = body.seed
        if seed is None:
            seed = secrets.randbits(62)
        prompts = [ids for ids in prompts for _ in range(body.n or 1)]
        self.sequences = []
        for index, ids in enumerate(prompts):
            limit = min(body.max_new_tokens(), api.context - len(ids))
            sampling = body.sampling(limit, seed % 2**62 + index)
            emit = partial(self.receive, index)
            self.sequences.append(Sequence(ids, sampling, api.tokenizer, emit, body.stops(), api.stop_ids,
                                           body.n_logprobs()))

    def receive(self, index, piece):
        """Take a Piece from the engine's thread."""
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

    async def __call__(self, scope, receive, send):
        """Respond until all is sent or the client has gone. Then the sequences leave the engine."""
        respond = self.stream if self.body.stream else self.whole
        response = asyncio.ensure_future(respond(scope, receive, send))
        gone = asyncio.ensure_future(receive())  # the body has been read: a disconnect
        try:
            await asyncio.wait({response, gone}, return_when=asyncio.FIRST_COMPLETED)
            if response.done():
                response.result()
        finally:
            for sequence in self.sequences:
                sequence.is_over = True
            response.cancel()
            gone.cancel()

    async def each_piece(self):
        """Yield (index, Piece) until all sequences are complete."""
        n_left = len(self.sequences)
        while n_left:
            index, piece = await self.pieces.get()
            if piece.finish_reason == 'error':
                raise failure()
            yield index, piece
            n_left -= piece.finish_reason is not None

    async def whole(self, scope, receive, send):
        async for _ in self.each_piece():
            pass
        choices = []
        for index, sequence in enumerate(self.sequences):
            content = self.whole_content(sequence.text)
            choices.append(self.choice(index, content, sequence.tokens, sequence.finish_reason))
        value = {**self.head, 'object': self.object, 'choices': choices, 'usage': self.usage()}
        await as_response(value)(scope, receive, send)

    async def stream(self, scope, receive, send):
        await StreamingResponse(self.events(), headers={'Cache-Control': 'no-store'},
                                media_type='text/event-stream').stream_response(send)

    async def events(self):
        for index in range(len(self.sequences)):
            if self.first_delta:
                yield self.event([self.choice(index, {'delta': self.first_delta}, [], None)])
        try:
            async for index, (text, tokens, reason) in self.each_piece():
                yield self.event([self.choice(index, self.new_content(text), tokens, reason)])
        except Refusal as refusal:
            yield b'data: ' + json_line(refusal.value) + b'\n'
            return
        options = self.body.stream_options
        if options and options.include_usage:
            yield self.event([], usage=self.usage())
        yield b'data: [DONE]\n\n'

    def event(self, choices, **others):
        value = {**self.head, 'object': self.chunk_object, 'choices': choices, **others}
        return b'data: ' + json_line(value) + b'\n'

    def choice(self, index, content, tokens, reason):
        logprobs = None
        if tokens and tokens[0].logprob is not None:
            logprobs = self.logprobs(tokens)
        return {'index': index, **content, 'logprobs': logprobs, 'finish_reason': reason}

    def usage(self):
        n_drawn = sum(sequence.n_tokens for sequence in self.sequences)
        return {'prompt_tokens': self.n_prompt_tokens, 'completion_tokens': n_drawn,
                'total_tokens': self.n_prompt_tokens + n_drawn}


class TextAnswer(Answer):
    prefix, object, chunk_object, param = 'cmpl', 'text_completion', 'text_completion', 'prompt'

    def whole_content(self, text):
        return {'text': text}

    new_content = whole_content

    def logprobs(self, tokens):
        text_of = self.tokenizer.decode
        return {'tokens': [text_of([token.id]) for token in tokens],
                'token_logprobs': [token.logprob for token in tokens],
                'top_logprobs': [{text_of([i]): logprob for i, logprob in token.top} for token in tokens],
                'text_offset': [token.offset for token in tokens]}


class ChatAnswer(Answer):
    prefix, object, chunk_object, param = 'chatcmpl', 'chat.completion', 'chat.completion.chunk', 'messages'
    first_delta = {'role': 'assistant', 'content': ''}

    def whole_content(self, text):
        return {'message': {'role': 'assistant', 'content': text, 'refusal': None}}

    def new_content(self, text):
        return {'delta': {'content': text} if text else {}}

    def logprobs(self, tokens):
        content = []
        for token in tokens:
            top = [self.entry(*pair) for pair in token.top]
            content.append({**self.entry(token.id, token.logprob), 'top_logprobs': top})
        return {'content': content}

    def entry(self, token_id, logprob):
        return {'token': self.tokenizer.decode([token_id]), 'logprob': logprob,
                'bytes': list(self.tokenizer.decode_bytes([token_id]))}


# -----------------------------------------------------------------------------
# the application


async def on_http_error(request: Request, error: HTTPException):
    if not isinstance(error, Refusal):  # from FastAPI
        error = Refusal(error.status_code, str(error.detail))
    return error.response()


async def on_fault(request: Request, error: Exception):
    return failure().response()


def make_app(api: Api, *, api_key: str = '', origins=(), hosts=None) -> FastAPI:
    """Return the ASGI application.

    api_key  of all requests to /v1; '' = none
    origins  of other sites whose pages may use the API; '*' = all
    hosts    names of the server in requests; None = any
    """
    app = FastAPI(openapi_url=None)  # FastAPI's documentation pages load scripts from other hosts
    app.add_api_route('/', api.page, methods=['GET', 'HEAD'])
    app.add_api_route('/v1/models', api.models)
    app.add_api_route('/v1/completions', api.completions, methods=['POST'])
    app.add_api_route('/v1/chat/completions', api.chat, methods=['POST'])
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_fault)
    app.add_middleware(Guard, api_key=api_key, origins=origins, hosts=hosts)
    if origins:  # outermost, so that pages can read errors
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=['GET', 'POST'],
                           allow_headers=['Authorization', 'Content-Type'])
    return app
