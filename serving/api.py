"""OpenAI's HTTP API over an Engine, and the chat page.

    GET  /                       page.html, with a policy that allows its own scripts and styles alone
    GET  /v1/models              also tells `context` (tokens) and `chat` (whether it has a template)
    POST /v1/completions
    POST /v1/chat/completions    truncation='auto': the oldest turns that no longer fit are left out

Errors have OpenAI's shape, {"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import base64
import hashlib
import re
import secrets
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from chat import Sampling, json_line
from corpus.template import Template
from serving.engine import Engine, Full, Piece, Sequence
from serving.guard import Guard, Refusal, as_response
from serving.schema import ChatRequest, CompletionRequest
from tokens.tokenizer import opening

PAGE = Path(__file__).with_name('page.html')


@dataclass
class Api:
    """The routes.

    name      the model's id
    style     prompt template; '' = a base model, which does not chat
    no_chat   for a base model: the reason and the remedy
    sampling  defaults of requests that do not say how to draw
    """
    engine: Engine
    name: str
    style: str
    no_chat: str
    sampling: Sampling
    stop_ids: set

    def __post_init__(self):
        self.created = int(time.time())
        self.context = self.engine.model.config.block_size
        self.tokenizer = self.engine.tokenizer
        self.html, self.policy = read_page(PAGE)

    async def page(self) -> Response:
        headers = {'Content-Security-Policy': self.policy, 'X-Content-Type-Options': 'nosniff'}
        return Response(self.html, headers=headers, media_type='text/html')

    async def models(self) -> Response:
        model = {'id': self.name, 'object': 'model', 'created': self.created, 'owned_by': 'flatgpt',
                 'context': self.context, 'chat': bool(self.style)}
        return as_response({'object': 'list', 'data': [model]})

    def check_model(self, name):
        if name not in (None, self.name):
            raise Refusal(404, f'the model {name!r} does not exist here, {self.name!r} does', 'model',
                          'model_not_found')

    async def completions(self, body: CompletionRequest) -> Response:
        self.check_model(body.model)
        prompts = await asyncio.to_thread(self.encode_prompts, body.prompt)
        return self.answer(body, prompts, TextFormat(self.tokenizer), body.logprobs)

    async def chat(self, body: ChatRequest) -> Response:
        self.check_model(body.model)
        if not self.style:
            raise Refusal(400, self.no_chat, 'messages')
        ids = await asyncio.to_thread(self.encode_conversation, body)
        return self.answer(body, [ids], ChatFormat(self.tokenizer), body.n_logprobs())

    def encode_prompts(self, prompt) -> list[list[int]]:
        """Return the ids of each prompt: a text, a list of ids, or a list of those."""
        is_one = isinstance(prompt, str) or all(isinstance(part, int) for part in prompt)
        prompts = [prompt] if is_one else prompt
        self.check_count(len(prompts), 'prompt')  # before the work of encoding
        return [self.encode_prompt(part) for part in prompts]

    def check_count(self, n, param):
        most = self.engine.max_batch + self.engine.max_queue
        if n > most:
            raise Refusal(400, f'{n} answers at once: this server takes at most {most}', param)

    def encode_prompt(self, prompt):
        tokenizer = self.tokenizer
        if not prompt:
            return opening(tokenizer)
        try:
            if isinstance(prompt, list):
                return tokenizer.checked(prompt)
            text = prompt.replace('\r\n', '\n')  # as corpora are read
            return tokenizer.prefix + tokenizer.encode(text, allowed_special={'<|endoftext|>'})
        except (ValueError, OverflowError) as error:
            raise Refusal(400, str(error), 'prompt') from None

    def encode_conversation(self, body):
        turns, template = body.turns(), Template(self.tokenizer, self.style)
        if body.truncation == 'disabled':
            return template.encode([*turns, ('assistant', None)])[0]
        n_reserved = min(body.max_new_tokens() or self.context, max(1, self.context // 4))
        fitted = template.fit(turns, self.context - n_reserved)
        if fitted is None:
            raise Refusal(400, f'the context of {self.context} tokens has no room for a question',
                          'messages', 'context_length_exceeded')
        return fitted.ids.tolist()

    def answer(self, body, prompts, form, n_logprobs) -> Response:
        """Queue the sequences of a request, and return the response that waits for them."""
        body.check_supported()
        longest = max(map(len, prompts))
        if longest >= self.context:
            raise Refusal(400, f"the prompt has {longest} tokens; the model's context of {self.context} "
                          'tokens holds prompt and answer: shorten it', form.param, 'context_length_exceeded')
        answer = Answer(form, self.name, body, sum(map(len, prompts)))
        seed = secrets.randbits(62) if body.seed is None else body.seed % 2**62
        sequences = []
        for ids in prompts:
            limit = min(body.max_new_tokens() or self.context, self.context - len(ids))
            for _ in range(body.n or 1):
                sampling = body.sampling(self.sampling, limit, seed + len(sequences))
                emit = partial(answer.receive, len(sequences))
                sequences.append(Sequence(ids, sampling, self.tokenizer, emit, body.stops(), self.stop_ids,
                                          n_logprobs))
        self.check_count(len(sequences), 'n')
        answer.sequences = sequences
        try:
            self.engine.submit(sequences)
        except Full:
            raise Refusal(429, 'the queue is full: try again later', None, 'queue_full') from None
        return answer


class Answer(Response):
    """The response to a request for text: whole, or as server-sent events while it is generated."""

    def __init__(self, form, model, body, n_prompt_tokens):
        super().__init__()
        self.form, self.body, self.n_prompt_tokens = form, body, n_prompt_tokens
        self.head = {'id': f'{form.prefix}-{secrets.token_hex(12)}', 'created': int(time.time()),
                     'model': model}
        self.sequences = []
        self.loop, self.pieces = asyncio.get_running_loop(), asyncio.Queue()

    def receive(self, index, piece):
        """Take a Piece from the engine's thread."""
        if not self.loop.is_closed():
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
            yield index, piece
            n_left -= piece.finish_reason is not None

    async def whole(self, scope, receive, send):
        wholes = [Piece('', [])] * len(self.sequences)
        async for index, (text, tokens, reason) in self.each_piece():
            before = wholes[index]
            wholes[index] = Piece(before.text + text, before.tokens + tokens, reason)
            if reason == 'error':
                return await INTERNAL.response()(scope, receive, send)
        choices = [self.form.whole(index, *whole) for index, whole in enumerate(wholes)]
        value = {**self.head, 'object': self.form.object, 'choices': choices, 'usage': self.usage()}
        await as_response(value)(scope, receive, send)

    async def stream(self, scope, receive, send):
        headers = [(b'content-type', b'text/event-stream; charset=utf-8'), (b'cache-control', b'no-store')]
        await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
        async for value in self.chunks():
            data = value if isinstance(value, bytes) else json_line(value).strip()
            await send({'type': 'http.response.body', 'body': b'data: ' + data + b'\n\n', 'more_body': True})
        await send({'type': 'http.response.body', 'body': b''})

    async def chunks(self):
        """Yield the value of each event."""
        options = self.body.stream_options
        counts = bool(options and options.include_usage)
        head = {**self.head, 'object': self.form.chunk_object} | ({'usage': None} if counts else {})
        for index in range(len(self.sequences)):
            if self.form.opening:
                yield {**head, 'choices': [{'index': index, **self.form.opening}]}
        async for index, piece in self.each_piece():
            if piece.finish_reason == 'error':
                yield INTERNAL.value
                return
            yield {**head, 'choices': [self.form.chunk(index, *piece)]}
        if counts:
            yield {**head, 'choices': [], 'usage': self.usage()}
        yield b'[DONE]'

    def usage(self):
        n_drawn = sum(sequence.n_tokens for sequence in self.sequences)
        return {'prompt_tokens': self.n_prompt_tokens, 'completion_tokens': n_drawn,
                'total_tokens': self.n_prompt_tokens + n_drawn}


INTERNAL = Refusal(500, 'the model failed on this request, see the log of the server')


# -----------------------------------------------------------------------------
# the shapes of choices


@dataclass
class TextFormat:
    """Choices of /v1/completions."""
    tokenizer: object
    prefix, object, chunk_object, param = 'cmpl', 'text_completion', 'text_completion', 'prompt'

    def whole(self, index, text, tokens, reason):
        return self.choice(index, {'text': text}, tokens, reason)

    opening, chunk = None, whole

    def choice(self, index, content, tokens, reason):
        logprobs = None
        if tokens and tokens[0].logprob is not None:
            logprobs = self.logprobs(tokens)
        return {'index': index, **content, 'logprobs': logprobs, 'finish_reason': reason}

    def logprobs(self, tokens):
        return {'tokens': [self.text(token.id) for token in tokens],
                'token_logprobs': [token.logprob for token in tokens],
                'top_logprobs': [{self.text(i): logprob for i, logprob in token.top} for token in tokens],
                'text_offset': [token.offset for token in tokens]}

    def text(self, token_id):
        return self.tokenizer.decode([token_id])


class ChatFormat(TextFormat):
    """Choices of /v1/chat/completions."""
    prefix, object, chunk_object, param = 'chatcmpl', 'chat.completion', 'chat.completion.chunk', 'messages'
    opening = {'delta': {'role': 'assistant', 'content': ''}, 'logprobs': None, 'finish_reason': None}

    def whole(self, index, text, tokens, reason):
        message = {'role': 'assistant', 'content': text, 'refusal': None}
        return self.choice(index, {'message': message}, tokens, reason)

    def chunk(self, index, text, tokens, reason):
        return self.choice(index, {'delta': {'content': text} if text else {}}, tokens, reason)

    def logprobs(self, tokens):
        content = []
        for token in tokens:
            top = [self.entry(*pair) for pair in token.top]
            content.append({**self.entry(token.id, token.logprob), 'top_logprobs': top})
        return {'content': content, 'refusal': None}

    def entry(self, token_id, logprob):
        bytes_ = list(self.tokenizer.decode_bytes([token_id]))
        return {'token': self.text(token_id), 'logprob': logprob, 'bytes': bytes_}


# -----------------------------------------------------------------------------
# the application


def read_page(path):
    """Return the page and its Content-Security-Policy, which names its inline scripts and styles by hash."""
    html = path.read_text(encoding='utf-8') if path.exists() else ''
    rules = ["default-src 'none'", "connect-src 'self'", 'img-src data:', "base-uri 'none'",
             "form-action 'none'", "frame-ancestors 'none'"]
    for tag, rule in (('script', 'script-src'), ('style', 'style-src')):
        blocks = re.findall(rf'<{tag}\b[^>]*>(.*?)</{tag}>', html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode('utf-8')).digest()) for block in blocks]
        rules.append(' '.join([rule, *(f"'sha256-{digest.decode()}'" for digest in digests)]))
    return html, '; '.join(rules)


async def on_invalid(request: Request, error: RequestValidationError):
    """Report a value of the wrong type or range as OpenAI does: 400, and the name of the parameter."""
    first = error.errors()[0]
    if first['type'] == 'json_invalid' or len(first['loc']) < 2:
        return Refusal(400, 'send a JSON object, with Content-Type: application/json').response()
    param = first['loc'][1]
    return Refusal(400, f'{param}: {first["msg"]}', param).response()


async def on_http_error(request: Request, error: HTTPException):
    if not isinstance(error, Refusal):  # from FastAPI
        error = Refusal(error.status_code, str(error.detail))
    return error.response(error.headers)


async def on_fault(request: Request, error: Exception):
    return INTERNAL.response()


def make_app(api: Api, *, api_key: str = '', origins=(), hosts=None) -> FastAPI:
    """Return the ASGI application.

    api_key  of all requests to /v1; '' = none
    origins  of other sites whose pages may use the API; '*' = all
    hosts    names of the server in requests; None = any
    """
    app = FastAPI(openapi_url=None)  # FastAPI's documentation pages load scripts from other hosts
    app.add_api_route('/', api.page, methods=['GET', 'HEAD'])
    app.add_api_route('/v1/models', api.models, methods=['GET'])
    app.add_api_route('/v1/completions', api.completions, methods=['POST'])
    app.add_api_route('/v1/chat/completions', api.chat, methods=['POST'])
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_fault)
    app.add_middleware(Guard, api_key=api_key, origins=origins, hosts=hosts)
    if origins:  # outermost, so that pages can read errors
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=['GET', 'POST'],
                           allow_headers=['Authorization', 'Content-Type'])
    return app
