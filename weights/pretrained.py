"""Models of transformers, in and out: folders in its format, .npz files, and GPT-2 on the hub.

    GPT.from_pretrained('gpt2')                     # downloaded once; or a folder, or x.npz
    model.save_pretrained('exported', tokenizer)    # for AutoModelForCausalLM and AutoTokenizer

architectures.py knows the names and settings of each model class, formats.py the files.
"""

from pathlib import Path

import torch

from files import read_json, write_atomically, write_json
from tokens.tokenizer import GPT2_META, read_tokenizer_json
from tokens.tokenizer_json import tokenizer_config
from weights.architectures import ARCHITECTURES, ConfigReader, model_type_of
from weights.foreign import check_model_args
from weights.formats import Npz, open_folder, write_npz, write_safetensors

# repository and commit, so that the weights are the same tomorrow
HUB = {
    'gpt2': ('openai-community/gpt2', '607a30d783dfa663caf39e06633721c8d4cfcd7e'),
    'gpt2-medium': ('openai-community/gpt2-medium', '6dcaa7a952f72f9298047fd5137cd6e4f05f41da'),
    'gpt2-large': ('openai-community/gpt2-large', '32b71b12589c2f8d625668d2335a01cac3249519'),
    'gpt2-xl': ('openai-community/gpt2-xl', '15ea56dee5df4983c59b2538573817e1667135e2'),
}
HEAD = 'lm_head.weight'  # its name in all classes of transformers


# -----------------------------------------------------------------------------
# where a model is


def find(name: str, also=()) -> Path:
    """Return the folder or .npz file of a model. GPT-2's four sizes are downloaded if the cache lacks them.

    name    one of HUB, or a path; a folder named gpt2 is ./gpt2
    also    other values that the setting init_from accepts, if the name comes from there
    raises  FileNotFoundError, or OSError if the hub cannot be reached
    """
    if name in HUB:
        return download(name)
    path = Path(name)
    if (path.is_file() and path.suffix == '.npz') or (path / 'config.json').is_file():
        return path
    source = f'init_from={name}' if also else name
    if path.is_dir():
        has_checkpoint = (path / 'ckpt.pt').is_file()
        of_a_run = f', for that of a run name {path / "ckpt.pt"}' if has_checkpoint else ''
        raise FileNotFoundError(f"{source} has no config.json: a model in transformers' "
                                f'format is config.json and model.safetensors{of_a_run}')
    names = ', '.join([*also, *HUB])
    raise FileNotFoundError(f'{source}: no such model, accepted are {names}, a folder with config.json and '
                            'model.safetensors, or an .npz file that save_pretrained wrote')


def download(name):
    """Return the folder of GPT-2's files in the hub's cache. HF_ENDPOINT and HF_HUB_OFFLINE apply."""
    repository, commit = HUB[name]
    files = ('config.json', 'model.safetensors')
    remedy = f'put {" and ".join(files)} of {repository} into a folder and use --init_from=FOLDER'
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ValueError(f'{name} is downloaded by huggingface_hub: '
                         f'pip install huggingface_hub, or {remedy}') from None
    cached = [hub.try_to_load_from_cache(repository, file, revision=commit) for file in files]
    if all(isinstance(path, str) for path in cached):
        return Path(cached[0]).parent
    try:
        # one request first: hf_hub_download tries a dead network for half a minute
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, files[0], revision=commit))
        paths = [Path(hub.hf_hub_download(repository, file, revision=commit)) for file in files]
        return paths[0].parent
    except Exception as error:  # the errors of its HTTP library change with its versions
        reason = ' '.join(str(error).split())[:150] or type(error).__name__
        source = hub.constants.ENDPOINT
        raise OSError(f'{name} cannot be downloaded from {source} ({reason}): {remedy}') from None


def read_tokenizer(name: str) -> dict | None:
    """Return meta() of the tokenizer that belongs to a model, or None if the model has none.

    raises  ValueError for a tokenizer that is not supported: another one would give other ids
    """
    if name in HUB:
        return dict(GPT2_META)
    path = find(name)
    if path.is_file():
        return Npz(path).settings()['tokenizer']
    return read_tokenizer_json(path)


# -----------------------------------------------------------------------------
# reading


def read_model_args(path: Path) -> dict:
    """Return the arguments of GPTConfig, but for dropout, for a model that find() returned.

    raises  ValueError for a model that model.py cannot be
    """
    if path.is_file():
        args = Npz(path).settings()['model_args']
        return {name: value for name, value in args.items() if name != 'dropout'}
    file = path / 'config.json'
    settings = read_json(file)
    model_type = settings.get('model_type') if isinstance(settings, dict) else None
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        accepted = ' and '.join(f'{name} ({each.class_name})' for name, each in ARCHITECTURES.items())
        raise ValueError(f'{file}: model_type = {model_type!r} is not supported, accepted are {accepted}')
    architecture, config = ARCHITECTURES[model_type], ConfigReader(settings, file)
    for name, value in architecture.fixed.items():
        config.need(name, value, value)
    args = dict(architecture.read(config), arch=architecture.arch)
    weights = open_folder(path)
    check_model_args(args, file, len(weights.names))
    if architecture.biased and not args['bias']:
        # exported without biases, as zeros; training elsewhere may have changed them
        args['bias'] = any(bool(weights[name].any()) for name in weights.names if name.endswith('.bias'))
    return args


@torch.no_grad()
def fill(model, path: Path):
    """Copy the weights at path into a model, one at a time.

    raises  ValueError naming what is missing, unexpected, of another shape, or unreadable
    """
    architecture = ARCHITECTURES[model_type_of(model.config)]
    weights = Npz(path) if path.is_file() else open_folder(path)
    unused, missing, prefix = set(weights.names), [], ''
    if not path.is_file():
        if not any(name.startswith(architecture.prefix) for name in weights.names):
            prefix = architecture.prefix  # to remove: a model saved without its head has no prefix
        if model.lm_head.weight is model.transformer.wte.weight:
            embedding = architecture.outside['transformer.wte.weight'][0]
            check_tied(weights, HEAD, embedding.removeprefix(prefix), path)
            unused.discard(HEAD)

    for name, parameter in model.named_parameters():
        parts = [(name, parameter)] if path.is_file() else architecture.parts(name, parameter, model.config)
        for stored_name, part in parts:
            stored_name = stored_name.removeprefix(prefix)
            if stored_name not in unused:
                missing.append(stored_name)
                continue
            unused.remove(stored_name)
            copy(weights[stored_name], part, f'{path}: {stored_name}')

    if architecture.biased and not model.config.bias:
        unused = {name for name in unused if not name.endswith('.bias')}  # zeros, see read_model_args()
    if missing or unused:
        raise ValueError(f'{path} does not fit its configuration: '
                         f'{len(missing)} weights missing ({", ".join(missing[:3])}), '
                         f'{len(unused)} unexpected ({", ".join(sorted(unused)[:3])})')


def copy(stored, part, source):
    if stored.shape != part.shape:
        raise ValueError(f'{source} has shape {tuple(stored.shape)}, '
                         f'its configuration makes it {tuple(part.shape)}')
    if not part.is_contiguous():
        part, stored = part.t(), stored.t()  # filling rows is faster than filling columns
    part.copy_(stored)


def check_tied(weights, head, embedding, path):
    """Refuse a head that differs from the embedding with which it should share its values.

    The tensors are mapped anew for every few rows, so that the pages read do not stay resident.
    """
    if not {head, embedding} <= weights.names:
        return
    n_rows, step = len(weights[head]), 4096
    is_equal = weights[head].shape == weights[embedding].shape and all(
        torch.equal(weights[head][i:i + step].float(), weights[embedding][i:i + step].float())
        for i in range(0, n_rows, step))
    if not is_equal:
        raise ValueError(f'{path}: {head} is not {embedding}: its architecture has one matrix for both')


# -----------------------------------------------------------------------------
# writing


def save(model, path, tokenizer=None, chat_template=None) -> list[Path]:
    """Write a folder that transformers loads, or one .npz file. Return the paths written.

    chat_template is the Jinja template of a tuned model (corpus/template.py).

    Padding of the vocabulary is written too, so that the weights come back as they are.
    generation_config.json keeps padding from being sampled.
    """
    path, config = Path(path), model.config
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if path.suffix == '.npz':
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = tokenizer.meta() if tokenizer else None
        settings = dict(format=1, model_args=vars(config), tokenizer=meta)
        write_atomically(path, lambda f: write_npz(f, settings, tensors))
        return [path]

    path.mkdir(parents=True, exist_ok=True)
    architecture = ARCHITECTURES[model_type_of(config)]
    if architecture.biased and not config.bias:
        for name in [name for name in tensors if architecture.biased.search(name)]:
            tensors[name.removesuffix('weight') + 'bias'] = tensors[name].new_zeros(len(tensors[name]))
    stored = {}
    for name, tensor in tensors.items():
        stored.update(architecture.parts(name, tensor, config))
    write_atomically(path / 'model.safetensors', lambda f: write_safetensors(f, stored))

    dtype = next(iter(tensors.values())).dtype
    files = text_files(config, dtype, tokenizer)
    if tokenizer is not None and chat_template:
        files['tokenizer_config.json']['chat_template'] = chat_template
    for name, content in files.items():
        write_json(path / name, content, indent=None if name == 'tokenizer.json' else 2)
    return [path / name for name in ('model.safetensors', *files)]


def text_files(config, dtype, tokenizer):
    """Return the JSON files beside the weights, {name: content}; last config.json, for which find() looks."""
    files, n_tokens = {}, config.vocab_size
    ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if tokenizer is not None:
        n_tokens = tokenizer.vocab_size
        ids = dict(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eot, pad_token_id=tokenizer.pad)
        files['tokenizer.json'] = tokenizer.tokenizer_json()
        files['tokenizer_config.json'] = dict(tokenizer_config(tokenizer), model_max_length=config.block_size)
    padding = list(range(n_tokens, config.vocab_size))
    files['generation_config.json'] = dict(ids, suppress_tokens=padding or None)
    model_type = model_type_of(config)
    architecture = ARCHITECTURES[model_type]
    files['config.json'] = dict(architectures=[architecture.class_name], model_type=model_type,
                                dtype=str(dtype).removeprefix('torch.'), vocab_size=config.vocab_size,
                                **ids, **architecture.fixed, **architecture.write(config))
    return files
