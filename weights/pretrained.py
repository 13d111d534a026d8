"""Models of transformers, in and out: folders in its format, .npz files, and models on the hub.

    GPT.from_pretrained('gpt2')                     # downloaded once; or a folder, or x.npz
    model.save_pretrained('exported', tokenizer)    # for AutoModelForCausalLM and AutoTokenizer
"""

import functools
import re
from dataclasses import replace
from pathlib import Path

import torch

from corpus.template import STYLES, Template
from files import one_line, print0, write_atomically, write_json, write_text
from tokens.tokenizer import GPT2_META, read_tokenizer_json
from tokens.tokenizer_json import tokenizer_config
from weights import adapters, gguf
from weights.architectures import ARCHITECTURES, VOCABULARY, architecture_of
from weights.card import TAGS
from weights.foreign import check_names, check_shape
from weights.formats import Npz, read_folder, read_settings, write_npz, write_safetensors

# commits of openai-community's repositories, so that the weights are the same tomorrow
HUB = {
    'gpt2': '607a30d783dfa663caf39e06633721c8d4cfcd7e',
    'gpt2-medium': '6dcaa7a952f72f9298047fd5137cd6e4f05f41da',
    'gpt2-large': '32b71b12589c2f8d625668d2335a01cac3249519',
    'gpt2-xl': '15ea56dee5df4983c59b2538573817e1667135e2',
}
HUB_NAME = re.compile(r'[\w.-]+/[\w.-]+(@[\w.-]+)?')
HEAD = 'lm_head.weight'  # its name in all classes of transformers
STYLE = 'conversation_style'  # in config.json: the template of corpus/template.py that the model was tuned on
ROWS = 4096  # of a matrix, copied at a time


# -----------------------------------------------------------------------------
# where a model is


def find(name: str) -> Path:
    """Return the folder or .npz file of a model. One on the hub is downloaded if the cache lacks it.

    name    a path, one of HUB, or ORGANIZATION/NAME[@REVISION] on the hub; a folder named gpt2 is ./gpt2
    """
    name = str(name)
    if name in HUB:
        return download(name)
    path = Path(name)
    is_npz = path.is_file() and path.suffix == '.npz'
    if is_npz or (path / 'config.json').is_file() or (path / adapters.CONFIG).is_file():
        return path
    if HUB_NAME.fullmatch(name) and not path.exists():
        return download(name)
    problem = 'no such model'
    if (path / 'ckpt.pt').is_file():
        problem = f'a folder of a run, name {path / "ckpt.pt"}'
    elif path.is_dir():
        problem = 'a folder without config.json'
    raise FileNotFoundError(f'init_from={name}: {problem}, accepted are scratch, resume, checkpoint, '
                            f'{", ".join(HUB)}, ORGANIZATION/NAME[@REVISION] on the hub, a folder with '
                            'config.json and model.safetensors, or an .npz file that save_pretrained wrote')


@functools.cache
def download(name):
    """Return the folder of a model in the hub's cache. HF_ENDPOINT and HF_HUB_OFFLINE apply."""
    import huggingface_hub as hub
    repository, _, revision = name.partition('@')
    if name in HUB:
        repository, revision = f'openai-community/{name}', HUB[name]
    try:
        cached = None
        if name in HUB:  # a pinned revision that is here needs no request
            cached = hub.try_to_load_from_cache(repository, 'model.safetensors', revision=revision)
        if isinstance(cached, str):
            folder = Path(cached).parent
        else:
            if name in HUB:  # fails at once; snapshot_download() tries a dead network for half a minute
                hub.get_hf_file_metadata(hub.hf_hub_url(repository, 'config.json', revision=revision))
            folder = Path(hub.snapshot_download(repository, revision=revision or None,
                                                allow_patterns=['*.json', '*.safetensors']))
    except Exception as error:  # the errors of its HTTP library change with its versions
        reason = ' '.join(str(error).split())[:150] or type(error).__name__
        raise OSError(f'{name} is no folder here, and cannot be downloaded from {hub.constants.ENDPOINT} '
                      f'({reason}): put config.json and model.safetensors of {repository} into a folder and '
                      'use --init_from=FOLDER') from None
    print0(f'{name}: revision {folder.name}')
    return folder


def read_tokenizer(name: str) -> dict | None:
    """Return meta() of the tokenizer that belongs to a model, or None if the model has none."""
    if name in HUB:
        return dict(GPT2_META)
    path = find(name)
    if path.is_file():
        return Npz(path).settings['tokenizer']
    tokenizer = read_tokenizer_json(path)
    if tokenizer is None and (base := adapters.base_of(path)):
        return read_tokenizer(base)
    return tokenizer


def read_style(name: str) -> str | None:
    """Return the conversation template that an exported model was tuned on."""
    path, settings = find(name), {}
    if path.is_file():
        settings = Npz(path).settings
    elif (path / 'config.json').is_file():  # an adapter has none
        settings = read_settings(path / 'config.json')
    if settings.get(STYLE) in list(STYLES):
        return settings[STYLE]
    return None


# -----------------------------------------------------------------------------
# reading


def padded(vocab_size: int) -> int:
    """Return the rows of embedding and head in training: multiples of 64 suit the matrix kernels."""
    return vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64


def read_model_args(path: Path) -> dict:
    """Return the arguments of GPTConfig, without dropout. ValueError for a model that it cannot be."""
    if path.is_file():
        args = Npz(path).settings['model_args']
        args.pop('dropout', None)
        return args
    if base := adapters.base_of(path):
        return read_model_args(find(base))
    file = path / 'config.json'
    settings = read_settings(file)
    model_type = settings.get('model_type')
    architecture = next((each for each in ARCHITECTURES if each.model_type == model_type), None)
    if architecture is None:
        accepted = ', '.join(f'{each.model_type} ({each.class_name})' for each in ARCHITECTURES)
        raise ValueError(f'{file}: model_type = {model_type!r} is not supported, accepted are {accepted}')
    weights = read_folder(path)
    with one_line(file):
        args = architecture.read(settings, len(weights))
    if architecture.biased and not args.get('bias', True):
        # exported without biases, as zeros; training elsewhere may have changed them
        args['bias'] = any(bool(weights[name][:].any()) for name in weights if name.endswith('.bias'))
    return args


@torch.no_grad()
def fill(model, path: Path, vocab_size: int):
    """Copy the weights at path into a model, a few rows at a time. ValueError if they do not fit.

    Rows beyond the file's vocab_size pad the vocabulary for training. They get the mean of the other rows, so
    n of them add at most log(1 + n / vocab_size) to a loss: less than 0.001 nats for GPT-2.
    Source: nlp.stanford.edu/~johnhew/vocab-expansion.html
    """
    if base := adapters.base_of(path):
        fill(model, find(base), vocab_size)
        adapters.merge(model, path)
        return
    # the stored weights, and the parts of ours to fill, both by their names in the file
    architecture, config = architecture_of(model.config), model.config
    parts, head = dict(model.named_parameters()), None
    for name in parts.keys() & VOCABULARY:
        parts[name] = parts[name][:vocab_size]
    if path.is_file():
        weights = Npz(path)
    else:
        parts, weights = architecture.parts(parts, config), read_folder(path)
        head, prefix = weights.pop(HEAD, None), architecture.block.partition('.')[0] + '.'
        if not any(name.startswith(prefix) for name in weights):  # saved without its head
            weights = {prefix + name: tensor for name, tensor in weights.items()}
        if head is not None and HEAD in parts:  # untied
            weights[HEAD], head = head, None
        if architecture.biased and not config.bias:  # zeros, see read_model_args()
            weights = {name: weights[name] for name in weights if not name.endswith('.bias')}

    check_names(parts, weights, path)
    for name, part in parts.items():
        stored = weights[name]
        check_shape(name, stored, part, path)
        for row in range(0, len(part), ROWS):
            part[row:row + ROWS].copy_(stored[row:row + ROWS])
    embedding = model.transformer.wte.weight
    if head is not None and not torch.equal(head[:].to(embedding.dtype), embedding[:vocab_size]):
        raise ValueError(f'{path}: {HEAD} is not the embedding: its architecture has one matrix for both')
    if config.vocab_size > vocab_size:
        for matrix in (embedding, model.lm_head.weight):
            matrix[vocab_size:] = matrix[:vocab_size].mean(dim=0)


# -----------------------------------------------------------------------------
# writing


def save(model, path, tokenizer=None, *, style=None, card='', quantize=None) -> list[Path]:
    """Write a folder that transformers loads, or one .npz or .gguf file. Return the paths written.

    A folder holds no rows that training added to pad the vocabulary. Rows that a model from elsewhere has for
    ids without a token, such as Qwen3's, are kept.

    style     conversation template that the model was tuned on
    card      text of README.md
    quantize  'int8', for .gguf
    """
    path, config = Path(path), model.config
    template = Template(tokenizer, style) if style else None
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.gguf':
        gguf.save(model, path, tokenizer, template, quantize)
        return [path]
    if path.suffix == '.npz':
        settings = {'format': 1, 'model_args': vars(config), 'tokenizer': tokenizer and tokenizer.meta(),
                    STYLE: style}
        write_atomically(path, lambda f: write_npz(f, settings, dict(model.named_parameters())))
        return [path]

    path.mkdir(exist_ok=True)
    if tokenizer is not None and config.vocab_size == padded(tokenizer.vocab_size):
        config = replace(config, vocab_size=tokenizer.vocab_size)
    stored = architecture_of(config).weights_of(model, config.vocab_size)
    write_atomically(path / 'model.safetensors', lambda f: write_safetensors(f, stored))
    names = ['model.safetensors']
    readme = path / 'README.md'
    if card and (not readme.exists() or TAGS in readme.read_text(errors='replace')):
        names.append(readme.name)
        write_text(readme, card)
    files = text_files(config, tokenizer, template)
    files['config.json']['dtype'] = str(model.transformer.wte.weight.dtype).removeprefix('torch.')
    if style:
        files['config.json'][STYLE] = style
    for name, content in files.items():  # last config.json, for which find() looks
        write_json(path / name, content, indent=2)
    return [path / name for name in [*names, *files]]


def text_files(config, tokenizer, template):
    """Return the JSON files beside the weights, {name: content}."""
    files, n_tokens = {}, config.vocab_size
    ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if tokenizer is not None:
        n_tokens = tokenizer.vocab_size
        ids = dict(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eot, pad_token_id=tokenizer.pad)
        files['tokenizer.json'] = tokenizer.tokenizer_json()
        files['tokenizer_config.json'] = dict(tokenizer_config(tokenizer), model_max_length=config.block_size)
        if template:
            files['tokenizer_config.json']['chat_template'] = template.jinja()
    padding = list(range(n_tokens, config.vocab_size))
    generation = dict(ids, suppress_tokens=padding or None)
    if template and template.end_id != tokenizer.eot:
        generation['eos_token_id'] = [template.end_id, tokenizer.eot]
    return files | {'generation_config.json': generation,
                    'config.json': architecture_of(config).write(config) | ids}
