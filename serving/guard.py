"""Refuse requests before they reach the API: strangers, wrong keys, large or slow bodies."""

import asyncio
import hmac
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response

from chat import json_line

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 30
TYPES = {401: 'authentication_error', 403: 'permission_error', 404: 'not_found_error',
         429: 'rate_limit_error', 500: 'server_error'}


class Refusal(HTTPException):
    """A request that is answered with an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(status, message)
        kind = TYPES.get(status, 'invalid_request_error')
        self.value = {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}

    def response(self, headers=None) -> Response:
        return as_response(self.value, self.status_code, headers)


def as_response(value: dict, status: int = 200, headers=None) -> Response:
    headers = {**(headers or {}), 'Cache-Control': 'no-store', 'X-Content-Type-Options': 'nosniff'}
    return Response(json_line(value), status, headers, 'application/json')


class Guard:
    """ASGI middleware. The arguments are those of make_app()."""

    def __init__(self, app, *, api_key, origins, hosts):
        self.app, self.api_key, self.origins, self.hosts = app, api_key.encode('utf-8'), origins, hosts

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        try:
            headers = Headers(scope=scope)
            self.check(scope['path'], headers)
            body = await asyncio.wait_for(read_body(headers, receive), BODY_TIMEOUT_S)
        except asyncio.TimeoutError:
            refusal = Refusal(408, f'the body did not arrive within {BODY_TIMEOUT_S} seconds')
        except Refusal as error:
            refusal = error
        else:
            return await self.app(scope, replay(body, receive), send)
        # the rest of the body is not read
        await refusal.response({'Connection': 'close'})(scope, receive, send)

    def check(self, path, headers):
        host = headers.get('host', '')
        if self.hosts is not None and re.sub(r':\d+$', '', host) not in self.hosts:
            # a name of another site that leads here: DNS rebinding
            raise Refusal(403, f'the host {host!r} is not served: use 127.0.0.1, or start with --host')
        origin = headers.get('origin')
        is_own = origin is None or urlsplit(origin).netloc == host
        if not is_own and origin not in self.origins and '*' not in self.origins:
            remedy = f': start it with --cors={origin}' if origin != 'null' else ''  # null: any file or frame
            raise Refusal(403, f'pages of {origin!r} may not use this server{remedy}')
        scheme, _, key = headers.get('authorization', '').partition(' ')
        is_right = scheme.lower() == 'bearer' and hmac.compare_digest(key.encode('latin-1'), self.api_key)
        if self.api_key and path != '/' and not is_right:
            raise Refusal(401, 'send the API key in the header Authorization: Bearer KEY', None,
                          'invalid_api_key')


async def read_body(headers, receive) -> bytes:
    refusal = Refusal(413, f'the body is larger than {MAX_BODY_BYTES:,} bytes')
    length = headers.get('content-length', '0')
    if not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
        raise refusal
    body = b''
    while True:
        message = await receive()
        body += message.get('body', b'')
        if len(body) > MAX_BODY_BYTES:
            raise refusal
        if not message.get('more_body'):  # complete, or disconnected
            return body


def replay(body, receive):
    """Return an ASGI receive() that gives the whole body first."""
    messages = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def receive_next():
        return messages.pop() if messages else await receive()
    return receive_next
