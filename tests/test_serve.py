"""The server, asked by the official client over real connections, and its engine against one answer at a time."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, run_here

for package in ('fastapi', 'uvicorn', 'httpx', 'openai'):
    pytest.importorskip(package)

import httpx  # noqa: E402
import openai  # noqa: E402
import pydantic  # noqa: E402
import uvicorn  # noqa: E402

from chat import Sampling, stop_ids  # noqa: E402
from corpus.template import Template  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from serving import guard  # noqa: E402
from serving.api import Api, make_app  # noqa: E402
from serving.engine import Engine, Sequence  # noqa: E402
from serving.schema import ChatRequest, CompletionRequest  # noqa: E402
from tokens.tokenizer import ByteTokenizer, load_tokenizer  # noqa: E402

BYTES = ByteTokenizer()
http = httpx.Client(timeout=300, limits=httpx.Limits(max_keepalive_connections=0))  # the machine may be busy
SHAPES = {'gpt2': {}, 'modern': {}, 'llama': dict(n_kv_head=2, qk_norm=True)}


def random_model(arch='gpt2', block_size=64, n_layer=2):
    torch.manual_seed(5)
    shape = dict(block_size=block_size, vocab_size=320, n_layer=n_layer, n_head=4, n_embd=32)
    model = GPT(GPTConfig(arch=arch, **shape, **SHAPES[arch])).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@contextlib.contextmanager
def serving(app):
    """The base URL of an ASGI application in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, http='h11', log_level='critical', timeout_graceful_shutdown=1))
    with socket.create_server(('127.0.0.1', 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f'http://127.0.0.1:{listener.getsockname()[1]}'
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def running(model, style='chat', max_batch=4, max_queue=4, tokenizer=BYTES, **options):
    """(base URL, engine) of a model's server."""
    engine = Engine(model, tokenizer, max_batch, max_queue).start()
    api = Api(engine, 'm', style, stop_ids(tokenizer))
    try:
        with serving(make_app(api, **options)) as url:
            yield url, engine
    finally:
        engine.close()


def connect(url):
    return socket.create_connection(url.removeprefix('http://').split(':'))


@pytest.fixture(scope='module')
def server():
    with running(random_model(), hosts={'127.0.0.1'}) as (url, engine):
        yield url, engine


@pytest.fixture(scope='module')
def client(server):
    with openai.OpenAI(base_url=server[0] + '/v1', api_key='none') as client:
        yield client


def alone(model, ids, sampling, ends=()):
    """What sample.py draws: (tokens, whether it ended by itself)."""
    torch.manual_seed(sampling.seed)
    steps = sampling.stream(model, BYTES, torch.tensor([ids]), stop_ids=ends)
    return [tokens[0] for tokens in steps]


# -----------------------------------------------------------------------------
# the engine


@pytest.mark.parametrize('arch', SHAPES)
def test_answers_in_a_changing_batch_are_those_of_one_at_a_time(arch):
    model, expected, drawn = random_model(arch), [], []
    engine = Engine(model, BYTES, max_batch=5, max_queue=99).start()
    sequences, over = [], threading.Semaphore(0)
    for i in range(14):  # some wait for a place, and each leaves at another time
        ids = torch.randint(256, (1 + 5 * i % 37,), generator=torch.Generator().manual_seed(i)).tolist()
        sampling = Sampling(3 + 7 * i % 27, *[(0, None, None), (1.0, None, None), (0.7, 9, None), (1.2, None, 0.8)][i % 4], seed=i)
        expected.append(alone(model, ids, sampling, {256}))
        drawn.append([])

        def emit(piece, mine=drawn[i]):
            mine.extend(token.id for token in piece.tokens)
            if piece.finish_reason:
                over.release()
        sequences.append(Sequence(ids, sampling, BYTES, emit, [], {256}))
    engine.submit(sequences[:6])
    engine.submit(sequences[6:])
    for _ in sequences:
        assert over.acquire(timeout=300)
    engine.close()
    assert drawn == expected and not any(sequence.text for sequence in sequences if sequence.n_tokens == 0)


@pytest.mark.parametrize('arch', SHAPES)
def test_prompts_read_together_are_answered_as_if_each_were_alone(arch):
    model, sequences = random_model(arch), []
    for i, n_tokens in enumerate((5, 12, 1, 30, 5, 17, 2)):
        ids = torch.randint(256, (n_tokens,), generator=torch.Generator().manual_seed(i)).tolist()
        sampling = Sampling(9 + i, [0, 1.0][i % 2], None, None, seed=i)
        sequences.append(Sequence(ids, sampling, BYTES, lambda piece: None, [], {256}))
    engine = Engine(model, BYTES, max_batch=4, max_queue=3)
    assert engine.submit(sequences)
    engine.run()
    for sequence in sequences:
        assert [token.id for token in sequence.tokens] == alone(model, sequence.ids, sequence.sampling, {256})


def test_a_longer_cache_than_its_first_columns():
    model = random_model(block_size=400)
    sampling, pieces, over = Sequence, [], threading.Event()
    sampling = Sampling(120, 1.0, None, None, 3)
    engine = Engine(model, BYTES, 2).start()
    sequence = Sequence([7] * 200, sampling, BYTES, lambda piece: (pieces.append(piece), piece.finish_reason and over.set()), [], set())
    engine.submit([sequence])
    assert over.wait(300)
    engine.close()
    assert [token.id for piece in pieces for token in piece.tokens] == alone(model, [7] * 200, sampling)


def pieces_of(data, stop=(), limit=99):
    """The pieces of an answer whose tokens are these bytes."""
    pieces = []
    sequence = Sequence([], Sampling(limit, 0, None, None, 0), BYTES, pieces.append, list(stop), {256})
    for token in [*data, 256]:
        if not sequence.is_over:
            sequence.push(token)
    return pieces


def test_characters_are_never_broken_and_what_is_no_character_is_marked():
    assert [piece.text for piece in pieces_of('a羊😀'.encode())] == ['a', '羊', '😀', '']
    assert ''.join(piece.text for piece in pieces_of('羊'.encode()[:2])) == '�'
    assert [piece.finish_reason for piece in pieces_of(b'abc', limit=2)] == [None, 'length']


def test_the_text_ends_before_a_stop_string_that_spans_tokens():
    pieces = pieces_of(b'one\n\nUser: two', ['\n\nUser:', 'zzz'])
    assert [piece.text for piece in pieces] == ['o', 'n', 'e', ''] and pieces[-1] == ('', [], 'stop')
    assert ''.join(piece.text for piece in pieces_of(b'one\n\nUse', ['\n\nUser:'])) == 'one\n\nUse'
    assert ''.join(piece.text for piece in pieces_of(b'aab', ['ab'])) == 'a'
    assert [len(piece.tokens) for piece in pieces_of(b'xab', ['b', 'zab'])] == [1, 1, 0]
    assert [(text, len(tokens)) for text, tokens, _ in pieces_of(b'aaab', ['aab'])] == [('a', 1), ('', 0)]
    assert [piece.text for piece in pieces_of('好的羊了'.encode(), ['的羊群', '羊了'])] == ['好', '的']


def test_a_failure_of_the_model_ends_the_answers_and_not_the_engine(monkeypatch, capsys):
    model, reasons, over = random_model(), [], threading.Event()

    def sequence():
        return Sequence([1, 2], Sampling(3, 0, None, None, 0), BYTES,
                        lambda piece: piece.finish_reason and (reasons.append(piece.finish_reason), over.set()), [], set())
    engine = Engine(model, BYTES).start()
    with monkeypatch.context() as patch:
        patch.setattr(model, 'head', lambda x: 1 / 0)
        engine.submit([sequence()])
        assert over.wait(300)
    over.clear()
    engine.submit([sequence()])
    assert over.wait(300) and reasons == ['error', 'length']
    engine.close()
    assert 'ZeroDivisionError' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# the client


def test_completions(client):
    model = random_model()
    for prompt, ids in (('The cat', list(b'The cat')), ('', [256]), ([5, 6], [5, 6])):
        done = client.completions.create(model='m', prompt=prompt, max_tokens=9, seed=4)
        drawn = alone(model, ids, Sampling(9, 0.8, 200, None, 4), stop_ids(BYTES))
        assert done.choices[0].text == BYTES.decode(drawn) and done.object == 'text_completion'
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), len(drawn))
        assert done.choices[0].finish_reason == ('length' if len(drawn) == 9 else 'stop')
    several = client.completions.create(model='m', prompt=['a', 'b'], n=2, max_tokens=5, seed=4, temperature=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3] and len({choice.text for choice in several.choices}) == 4
    again = client.completions.create(model='m', prompt=['a'], n=2, max_tokens=5, seed=4, temperature=2)
    assert [choice.text for choice in again.choices] == [choice.text for choice in several.choices[:2]]


def test_chat_uses_the_template_and_streams_the_same_text(client):
    messages = [{'role': 'developer', 'content': ' short '}, {'role': 'user', 'content': [{'type': 'text', 'text': 'cow?'}]}]
    whole = client.chat.completions.create(model='m', messages=messages, max_completion_tokens=12, seed=2, n=2)
    ids = Template(BYTES, 'chat').fit([('system', 'short'), ('user', 'cow?')], 64).ids.tolist()
    drawn = alone(random_model(), ids, Sampling(12, 0.8, 200, None, 2), stop_ids(BYTES))
    assert whole.choices[0].message.content == BYTES.decode(drawn) and whole.choices[0].message.role == 'assistant'
    streamed, texts = [], ['', '']
    for chunk in client.chat.completions.create(model='m', messages=messages, max_tokens=12, seed=2, n=2, stream=True,
                                                stream_options={'include_usage': True}):
        streamed.append(chunk)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ''
    assert texts == [choice.message.content for choice in whole.choices]
    assert streamed[-1].usage == whole.usage and whole.usage.prompt_tokens == len(ids) and streamed[0].usage is None
    text = ''.join(chunk.choices[0].text for chunk in client.completions.create(model='m', prompt='x', max_tokens=12, seed=2, stream=True))
    assert text == client.completions.create(model='m', prompt='x', max_tokens=12, seed=2).choices[0].text


def test_a_full_context_ends_an_answer(client):
    done = client.completions.create(model='m', prompt='x' * 60, max_tokens=30, temperature=0)
    assert done.choices[0].finish_reason == 'length' and done.usage.total_tokens == 64
    messages = [{'role': 'user', 'content': 'early'}, {'role': 'assistant', 'content': 'a' * 30}, {'role': 'user', 'content': 'q' * 30}]
    with pytest.raises(openai.BadRequestError, match="the model's context of 64 tokens") as refused:
        client.chat.completions.create(model='m', messages=messages)
    assert refused.value.code == 'context_length_exceeded'


def test_log_probabilities_are_those_of_the_model(client):
    done = client.completions.create(model='m', prompt='abc', max_tokens=3, temperature=0, logprobs=2)
    logprobs = random_model()(torch.tensor([list(b'abc')]))[0][0, -1, :BYTES.vocab_size].log_softmax(-1)
    reported = done.choices[0].logprobs
    assert abs(reported.token_logprobs[0] - logprobs.max().item()) < 1e-4 and reported.text_offset[0] == 0
    assert len(reported.tokens) == len(reported.top_logprobs) == done.usage.completion_tokens
    done = client.chat.completions.create(model='m', messages=[{'role': 'user', 'content': 'x'}], max_tokens=3, temperature=0,
                                          logprobs=True, top_logprobs=3)
    first = done.choices[0].logprobs.content[0]
    assert first.top_logprobs[0].logprob == first.logprob and len(first.top_logprobs) == 3 and bytes(first.bytes) == BYTES.decode_bytes([first.bytes[0]])


def test_the_models(client):
    model, = client.models.list().data
    assert (model.id, model.context, model.chat, model.object) == ('m', 64, True, 'model')


def test_a_base_model_completes_and_says_why_it_does_not_chat():
    with running(random_model(), style='') as (url, _), openai.OpenAI(base_url=url + '/v1', api_key='x') as client:
        assert not client.models.list().data[0].chat
        assert client.completions.create(model='m', prompt='x', max_tokens=2).choices[0].text
        with pytest.raises(openai.BadRequestError, match='not tuned on conversations: use /v1/completions, or tune it'):
            client.chat.completions.create(model='m', messages=[{'role': 'user', 'content': 'x'}])


# -----------------------------------------------------------------------------
# what is refused

TEXT, CHAT = '/v1/completions', '/v1/chat/completions'


@pytest.mark.parametrize('path, body, status, param', [
    (TEXT, {'model': 'x', 'prompt': 'a'}, 404, 'model'),
    (TEXT, {'prompt': 'a', 'max_tokens': '5'}, 400, 'max_tokens'),
    (TEXT, {'prompt': 'a', 'max_tokens': 10**30}, 400, 'max_tokens'),
    (TEXT, {'prompt': 'a', 'max_tokens': 0}, 400, 'max_tokens'),
    (TEXT, '{"prompt": "a", "temperature": NaN}', 400, 'temperature'),
    (TEXT, '{"prompt": "a", "temperature": 1e999}', 400, 'temperature'),
    (TEXT, '{"prompt": "a", "seed": ' + '9' * 5000 + '}', 400, None),
    (TEXT, {'prompt': 'a', 'temperature': -1}, 400, 'temperature'),
    (TEXT, {'prompt': 'a', 'top_p': 0}, 400, 'top_p'),
    (TEXT, {'prompt': 'a', 'n': 1000}, 400, 'n'),
    (TEXT, {'prompt': 'a', 'n': 9}, 400, 'n'),  # places and queue hold 8
    (TEXT, {'prompt': ['a'] * 1000}, 400, 'prompt'),  # refused before it is encoded
    (TEXT, {'prompt': 'a', 'n': True}, 400, 'n'),
    (TEXT, {'prompt': 'a', 'stop': list('abcde')}, 400, 'stop'),
    (TEXT, {'prompt': 'a', 'echo': True}, 400, 'echo'),
    (TEXT, {'prompt': 'a', 'best_of': 3}, 400, 'best_of'),
    (TEXT, {'prompt': 'x' * 64}, 400, 'prompt'),
    (TEXT, {'prompt': [1, 999]}, 400, 'prompt'),
    (TEXT, {'prompt': [1, -1]}, 400, 'prompt'),
    (TEXT, {'prompt': [10**30]}, 400, 'prompt'),
    (TEXT, {'prompt': {'a': 1}}, 400, 'prompt'),
    (TEXT, {'prompt': [[]] * 5000}, 400, 'prompt'),
    (TEXT, [], 400, None),
    (TEXT, '{"prompt": ', 400, None),
    (TEXT, '[' * 100_000, 400, None),
    (TEXT, b'{"prompt": "\xff"}', 400, None),
    (CHAT, {}, 400, 'messages'),
    (CHAT, {'messages': []}, 400, 'messages'),
    (CHAT, {'messages': [{'role': 'king', 'content': 'x'}]}, 400, 'messages'),
    (CHAT, {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': 'file:///etc/passwd'}]}]}, 400, 'messages'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y'}]}, 400, 'messages'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'tools': [{}]}, 400, 'tools'),
    (CHAT, {'messages': [{'role': 'user', 'content': 'x'}], 'top_logprobs': 99, 'logprobs': True}, 400, 'top_logprobs'),
    ('/v1/../serve.py', {}, 404, None),
    ('/docs', {}, 404, None),
    ('/v1/models', {}, 405, None),
])
def test_a_wrong_request_is_an_error_in_openais_shape(server, path, body, status, param):
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    answer = http.post(server[0] + path, content=content, headers={'Content-Type': 'application/json'})
    error = answer.json()['error']
    assert (answer.status_code, error['param']) == (status, param), error
    assert error['message'] and error['type']


@pytest.mark.parametrize('schema, body', [
    (CompletionRequest, {'prompt': [1.5] * 1000}), (CompletionRequest, {'prompt': [['a']] * 1000}), (ChatRequest, {'messages': [{}] * 1000}),
    (ChatRequest, {'messages': [{'role': 'user', 'content': [{}] * 1000}]})])
def test_a_long_list_is_refused_at_its_first_wrong_item(schema, body):
    with pytest.raises(pydantic.ValidationError) as refused:  # 250,000 errors would take 20 s, and nobody else would be answered
        schema.model_validate(body)
    assert refused.value.error_count() < 10


@pytest.mark.parametrize('prompt', ['\ud800', 'a\x00b', '\\ud83d', '<|endoftext|>', '\u202e'])
def test_odd_text_is_answered(server, prompt):
    answer = http.post(server[0] + TEXT, content=json.dumps({'prompt': prompt, 'max_tokens': 2}), headers={'Content-Type': 'application/json'})
    assert answer.status_code == 200 and answer.json()['usage']['prompt_tokens'] > 0
    answer = http.post(server[0] + TEXT, content=json.dumps({'prompt': 'a', 'model': prompt}), headers={'Content-Type': 'application/json'})
    assert answer.status_code == 404 and answer.json()['error']['code'] == 'model_not_found'


def test_a_text_that_the_tokenizer_cannot_write_is_refused():
    tokenizers = pytest.importorskip('tokenizers')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}))
    words.add_special_tokens(['<|endoftext|>'])
    tokenizer = load_tokenizer({'kind': 'json', 'tokenizer_json': words.to_str(), 'eot': '<|endoftext|>', 'config': {}})
    with running(random_model(), tokenizer=tokenizer) as (url, _):
        assert http.post(url + TEXT, json={'prompt': 'b'}).json()['error']['param'] == 'prompt'
        refused = http.post(url + CHAT, json={'messages': [{'role': 'user', 'content': 'b'}]})
        assert (refused.status_code, refused.json()['error']['param']) == (400, 'messages')


def test_strangers_are_refused(server):
    url, _ = server
    assert http.get(url + '/v1/models', headers={'Host': 'evil.example:80'}).status_code == 403
    assert http.get(url + '/v1/models', headers={'Origin': 'http://evil.example'}).status_code == 403
    assert http.get(url + '/v1/models', headers={'Origin': 'null'}).status_code == 403
    assert http.get(url + '/v1/models', headers={'Origin': 'http://['}).status_code == 403
    assert http.get(url + '/v1/models', headers={'Host': 'LOCALHOST:80'}).status_code == 403  # 127.0.0.1 alone
    own = http.get(url + '/v1/models', headers={'Origin': url})
    assert own.status_code == 200 and 'access-control-allow-origin' not in own.headers
    preflight = {'Origin': 'http://evil.example', 'Access-Control-Request-Method': 'POST'}
    assert http.options(url + TEXT, headers=preflight).status_code == 403
    assert http.post(url + TEXT, content='{"prompt": "a"}', headers={'Content-Type': 'text/plain'}).status_code == 400


def test_a_body_has_limits(server):
    url, _ = server
    json_type = {'Content-Type': 'application/json'}
    assert http.post(url + TEXT, content=b'x' * (guard.MAX_BODY_BYTES + 1), headers=json_type).status_code == 413
    assert http.post(url + TEXT, content=(b'x' * 65536 for _ in range(20)), headers=json_type).status_code == 413  # without a length


def test_a_key_and_other_sites():
    with running(random_model(), api_key='schlüssel', origins=['https://a.example']) as (url, _):
        right = {'Authorization': 'Bearer schlüssel'.encode()}
        assert http.get(url + '/v1/models').status_code == http.get(url + '/v1/models', headers={'Authorization': 'Bearer x'}).status_code == 401
        answer = http.get(url + '/v1/models', headers={**right, 'Origin': 'https://a.example'})
        assert answer.status_code == 200 and answer.headers['access-control-allow-origin'] == 'https://a.example'
        preflight = {'Origin': 'https://a.example', 'Access-Control-Request-Method': 'POST', 'Access-Control-Request-Headers': 'authorization'}
        assert http.options(url + TEXT, headers=preflight).status_code == 200
        assert http.get(url + '/').status_code == 200  # the page asks for the key


# -----------------------------------------------------------------------------
# who comes and goes


@pytest.fixture
def slow(monkeypatch):
    """A server with two places and a queue of one, whose answers take minutes: the model never ends one by itself."""
    model = random_model(block_size=2000)
    hidden, head = model.hidden, model.head
    monkeypatch.setattr(model, 'hidden', lambda *args, **kwargs: (time.sleep(0.05), hidden(*args, **kwargs))[1])
    monkeypatch.setattr(model, 'head', lambda x: head(x).index_fill(-1, torch.tensor(sorted(stop_ids(BYTES))), -torch.inf))
    with running(model, max_batch=2, max_queue=1) as (url, engine):
        yield url, engine


LONG = {'prompt': [1], 'max_tokens': 1900, 'stream': True, 'temperature': 0}


def until(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_queue_is_429_and_a_client_that_leaves_frees_its_place(slow):
    url, engine = slow
    with contextlib.ExitStack() as streams:
        for n in (1, 2, 3):
            answer = streams.enter_context(http.stream('POST', url + TEXT, json=LONG))
            assert answer.status_code == 200
            until(lambda: len(engine.running) + len(engine.waiting) == n)
        refused = http.post(url + TEXT, json=LONG)
        assert (refused.status_code, refused.json()['error']['type']) == (429, 'rate_limit_error')
        assert not engine.submit([None])
    until(lambda: not engine.running and not engine.waiting)
    with pytest.raises(httpx.ReadTimeout):  # and so does one that waits for a whole answer
        http.post(url + TEXT, json=LONG | {'stream': False}, timeout=httpx.Timeout(300, read=0.3))
    until(lambda: not engine.running)
    assert http.post(url + TEXT, json={'prompt': 'x', 'max_tokens': 2}).status_code == 200


def test_an_answer_that_nobody_reads_does_not_stop_the_others(slow):
    url, _ = slow
    with connect(url) as silent:
        body = json.dumps(LONG | {'logprobs': 20}).encode()
        silent.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b' % (len(body), body))
        assert http.post(url + TEXT, json={'prompt': 'x', 'max_tokens': 20}).status_code == 200


# -----------------------------------------------------------------------------
# the command


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp('serve') / 'out-dolly'
    random_model().save_pretrained(folder, BYTES, style='chat')
    return folder


def test_serve_runs_the_examples_of_the_documentation_and_ends_with_ctrl_c(exported):
    command = [sys.executable, str(ROOT / 'serve.py'), f'--init_from={exported}', '--port=0', '--device=cpu', '--dtype=float32']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8',
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        address = next(match for line in process.stdout if (match := re.match(r'(http://127.0.0.1:\d+) serves out-dolly, style chat', line)))[1]
        for file in ('docs/CHAT.md', 'docs/zh/CHAT.md'):
            text = (ROOT / file).read_text(encoding='utf-8').replace('http://127.0.0.1:8000', address)
            for example in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
                exec(example, {'print': lambda *args, **kwargs: None})
            for example in re.findall(r'```bash\n(curl .*?)```', text, re.DOTALL) if shutil.which('curl') else []:
                done = subprocess.run(example, shell=True, capture_output=True, text=True)
                assert '"choices"' in done.stdout or '"context"' in done.stdout, done
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=300) and process.returncode == 0
    finally:
        process.kill()


def test_a_port_in_use_and_a_missing_package_are_one_line(exported, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        code, _, error = run_here('serve.py', f'--init_from={exported}', f'--port={port}')
        assert code == 2 and error.startswith(f'--host=127.0.0.1 --port={port}: ') and error.count('\n') == 1
    monkeypatch.setitem(sys.modules, 'uvicorn', None)
    code, _, error = run_here('serve.py', f'--init_from={exported}')
    assert code == 2 and 'uvicorn' in error and 'pip install -r requirements.txt' in error and error.count('\n') == 1
