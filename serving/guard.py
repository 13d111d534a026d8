"""Refuse requests before they reach the API: strangers, wrong keys, large bodies."""

import hmac
import re

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chat import json_line

MAX_BODY_BYTES = 1 << 20
TYPES = {401: 'authentication_error', 403: 'permission_error', 429: 'rate_limit_error', 500: 'server_error'}


class Refusal(HTTPException):
    """An error of the API."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(status, message)
        kind = TYPES.get(status, 'invalid_request_error')
        self.value = {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}

    def response(self) -> Response:
        return as_response(self.value, self.status_code)


def failure() -> Refusal:
    return Refusal(500, 'the model failed on this request, see the log of the server')


def as_response(value: dict, status: int = 200) -> Response:
    return Response(json_line(value), status, media_type='application/json')


class Guard:
    """ASGI middleware. The arguments are those of make_app()."""

    def __init__(self, app, *, api_key, origins, hosts):
        self.app, self.api_key, self.origins, self.hosts = app, api_key.encode('utf-8'), origins, hosts

    async def __call__(self, scope, receive, send):
        app = self.app
        try:
            if scope['type'] == 'http':
                self.check(scope['path'], Headers(scope=scope))
        except Refusal as refusal:
            app = refusal.response()
        await app(scope, receive, send)

    def check(self, path, headers):
        host, origin = headers.get('host', ''), headers.get('origin')
        if self.hosts is not None and re.sub(r':\d+$', '', host.lower()) not in self.hosts:
            # a name of another site that leads here: DNS rebinding
            raise Refusal(403, f'the host {host!r} is not served: use 127.0.0.1, or start with --host')
        is_own = origin is None or origin.partition('://')[2] == host
        if not is_own and origin not in self.origins and '*' not in self.origins:
            raise Refusal(403, f'pages of {origin!r} may not use this server: see --cors')
        scheme, _, key = headers.get('authorization', '').partition(' ')
        is_right = scheme.lower() == 'bearer' and hmac.compare_digest(key.encode('latin-1'), self.api_key)
        if self.api_key and path != '/' and not is_right:
            raise Refusal(401, 'send the API key in the header Authorization: Bearer KEY', None,
                          'invalid_api_key')


async def read_body(request: Request) -> bytes:
    if not request.headers.get('content-type', '').startswith('application/json'):
        raise Refusal(400, 'send a JSON object, with Content-Type: application/json')
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise Refusal(413, f'the body is larger than {MAX_BODY_BYTES:,} bytes')
    except ClientDisconnect:
        raise Refusal(400, 'the body is incomplete') from None
    return bytes(body)
