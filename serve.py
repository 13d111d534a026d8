"""Serve a model by OpenAI's HTTP API, with a page to talk to it.

    python serve.py --out_dir=out-dolly                    # then open http://127.0.0.1:8000
    python serve.py --init_from=Qwen3-0.6B --port=8001
    FLATGPT_API_KEY=secret python serve.py --out_dir=out-dolly --host=0.0.0.0

A model that was tuned on conversations chats, any other completes texts.
"""

import contextlib
import os
import socket
from pathlib import Path
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # as in train.py

import devices
import distributed
from chat import check, choose_style, prepare_decoding, stop_ids
from configurator import configure
from files import one_line_errors, print0, printable
from weights.begin import build_model, find_start

# -----------------------------------------------------------------------------
# the model
init_from = 'resume'  # the checkpoint in out_dir; or gpt2 ... gpt2-xl, a transformers folder, an .npz file
out_dir = 'out'
checkpoint_path = ''  # this file instead of the checkpoint in out_dir; may be another trainer's
tokenizer = ''  # gpt2, byte, or a folder with tokenizer.json, for a model that has none
# prompt template; auto = the one the model was tuned with
style: Literal['auto', 'chat', 'alpaca', 'chatml'] = 'auto'
# the server
host = '127.0.0.1'  # this computer alone; 0.0.0.0 = reachable from others
port = 8000  # 0 = any that is free
api_key = ''  # required of each request; better in FLATGPT_API_KEY, because others can see flags
cors = ''  # origins of other sites whose pages may use the API, separated by commas; * = all
max_batch = 32  # answers that are generated at the same time
max_queue = 64  # answers that wait; more are refused
# system
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
quantize: Literal['none', 'int8'] = 'none'  # int8: a byte a weight, on the CPU
# -----------------------------------------------------------------------------


def open_socket(host, port):
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise ValueError(f'--host={host} --port={port}: {error}: use another port') from None


if __name__ == '__main__':
    with one_line_errors():
        configure(globals())

        # find mistakes in the settings before the weights are read
        check('max_batch', max_batch, max_batch >= 1, '1 or more')
        check('max_queue', max_queue, max_queue >= 0, '0 or more')
        import uvicorn

        from serving.api import Api, make_app
        from serving.engine import Engine
        listener = open_socket(host, port)

        # the model
        place = distributed.start(device)
        precision = devices.choose_dtype(dtype, place.device, packs=True)
        trained = find_start(init_from, out_dir, checkpoint_path, tokenizer=tokenizer)
        template = ''
        try:
            template = choose_style(style, trained)
        except ValueError as error:
            if style != 'auto':
                raise
            print0(f'no chat: {error}')
        model = build_model(trained, precision).to(place.device, precision)
        prepare_decoding(model, place.device, False, quantize, max_batch)

        # the server
        name = Path(out_dir if init_from == 'resume' else init_from).resolve().name
        engine = Engine(model, trained.tokenizer, max_batch, max_queue).start()
        hosts = {'127.0.0.1', 'localhost', '[::1]'}
        if host not in (*hosts, '::1'):
            hosts = None
        app = make_app(Api(engine, name, template, stop_ids(trained.tokenizer)),
                       api_key=api_key or os.environ.get('FLATGPT_API_KEY', ''),
                       origins=[origin for origin in cors.split(',') if origin], hosts=hosts)
        shown = f'[{host}]' if ':' in host else host
        kind = ': a base model, it completes texts'
        if template:
            kind = f', style {template}'
        print(f'http://{shown}:{listener.getsockname()[1]} serves {printable(name)}{kind}', flush=True)
        # unlike httptools, h11 limits the size of headers
        config = uvicorn.Config(app, http='h11', ws='none', log_level='warning', limit_concurrency=512,
                                server_header=False, timeout_graceful_shutdown=2)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run([listener])
        engine.close()
