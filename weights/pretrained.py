"""Models as other libraries keep them: folders in transformers' format, .npz files for NumPy, GPT-2 on the hub.

    GPT.from_pretrained('gpt2')                # downloaded once; or a folder with config.json and model.safetensors, or x.npz
    model.save_pretrained('exported', tokenizer)    # AutoModelForCausalLM and AutoTokenizer load it

arch='gpt2' is transformers' GPT2LMHeadModel, arch='modern' its NanoChatForCausalLM. This file knows the two configurations, names
and layouts of weights, and the file formats; model.py knows what a model is.

Each weight is mapped, copied to its place and let go, so that loading takes little more memory than the model. (The safetensors
package maps the file whole, and every page that was read then stays in the resident set: three times a bfloat16 model.)
"""

import json
import math
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

from files import write_atomically
from tokens.tokenizer import GPT2_META, read_tokenizer_json, tokenizer_config, vocab_size_of

# repository and commit, so that the weights are the same tomorrow
HUB = {
    'gpt2': ('openai-community/gpt2', '607a30d783dfa663caf39e06633721c8d4cfcd7e'),
    'gpt2-medium': ('openai-community/gpt2-medium', '6dcaa7a952f72f9298047fd5137cd6e4f05f41da'),
    'gpt2-large': ('openai-community/gpt2-large', '32b71b12589c2f8d625668d2335a01cac3249519'),
    'gpt2-xl': ('openai-community/gpt2-xl', '15ea56dee5df4983c59b2538573817e1667135e2'),
}


# -----------------------------------------------------------------------------
# where a model is


def find(name, also=()):
    """The folder or .npz file that a name stands for; GPT-2's four are downloaded where the hub's cache lacks them (a folder
    of that name is ./gpt2).

    also    where the name is the setting init_from: the words that it takes besides; the error names both
    raises  FileNotFoundError where there is none; OSError, one line with the way without a network, where the hub is out of reach
    """
    if name in HUB:
        return download(name)
    path = Path(name)
    if path.is_file() and path.suffix == '.npz' or (path / 'config.json').is_file():
        return path
    said = f'init_from={name}' if also else name
    if path.is_dir():
        raise FileNotFoundError(f'{said} has no config.json: a model in transformers\' format is config.json and model.safetensors'
                                + (f', for that of a run name {path / "ckpt.pt"}' if (path / 'ckpt.pt').is_file() else ''))
    raise FileNotFoundError(f'{said}: no such model, accepted are {", ".join([*also, *HUB])}, a folder with config.json and model.safetensors, '
                            'or an .npz file that save_pretrained wrote')


def download(name):
    """Folder of GPT-2's config.json and model.safetensors in the hub's own cache; HF_ENDPOINT and HF_HUB_OFFLINE apply."""
    repository, commit = HUB[name]
    files = ('config.json', 'model.safetensors')
    otherwise = f'put {" and ".join(files)} of {repository} into a folder and use --init_from=FOLDER'
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ValueError(f'{name} is downloaded by huggingface_hub: pip install huggingface_hub, or {otherwise}') from None
    paths = [hub.try_to_load_from_cache(repository, file, revision=commit) for file in files]
    if all(isinstance(path, str) for path in paths):
        return Path(paths[0]).parent
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, files[0], revision=commit))  # hf_hub_download asks a dead network for half a minute
        return [Path(hub.hf_hub_download(repository, file, revision=commit)) for file in files][0].parent
    except Exception as error:  # whatever its HTTP library raises: it has changed with its versions
        reason = ' '.join(str(error).split())[:150] or type(error).__name__
        raise OSError(f'{name} cannot be downloaded from {hub.constants.ENDPOINT} ({reason}): {otherwise}') from None


def read_tokenizer(name):
    """meta() of the tokenizer that belongs to a model, or None where nothing says."""
    if name in HUB:
        return dict(GPT2_META)
    path = find(name)
    return read_npz_settings(path)['tokenizer'] if path.is_file() else read_tokenizer_json(path)


# -----------------------------------------------------------------------------
# config.json <-> what GPTConfig takes

ACTIVATIONS = {'gelu_tanh': 'gelu_new', 'gelu': 'gelu', 'relu2': 'relu2'}  # ours: transformers'
SYNONYMS = {'gelu_pytorch_tanh': 'gelu_new'}

# what model.py has no switch for, by transformers' names; a config.json that leaves one out means the same
FIXED = {
    'gpt2': dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
                 tie_word_embeddings=True),
    'nanochat': dict(rms_norm_eps=1e-6, final_logit_softcapping=15.0, attention_bias=False, tie_word_embeddings=False),
}


def read_model_args(path):
    """What GPTConfig takes, dropout aside, of a model that find() found. ValueError for one that model.py cannot be."""
    if path.is_file():
        return read_npz_settings(path)['model_args']
    file = path / 'config.json'
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
        kind = config.get('model_type')
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f'{file}: not a configuration: {error}') from None

    def need(name, default, *accepted):
        value = config.get(name, default)
        if value not in accepted or isinstance(value, bool) != isinstance(accepted[0], bool):
            raise ValueError(f'{file}: {name} = {value!r} is not supported, accepted is {" or ".join(map(repr, accepted))}')
        return value

    def count(name, default):
        value = config.get(name, default)
        if type(value) is not int or value < 1:
            raise ValueError(f'{file}: {name} = {value!r} must be a whole number, 1 or more')
        return value

    def activation(name, default):
        theirs = need(name, default, *ACTIVATIONS.values(), *SYNONYMS)
        return next(k for k, v in ACTIVATIONS.items() if v == SYNONYMS.get(theirs, theirs))

    if not isinstance(kind, str) or kind not in FIXED:
        raise ValueError(f'{file}: model_type = {kind!r} is not supported, accepted are gpt2 (GPT2LMHeadModel) and nanochat (NanoChatForCausalLM)')
    for name, value in FIXED[kind].items():
        need(name, value, value)
    if kind == 'gpt2':
        C = count('n_embd', 768)
        need('n_inner', None, None, 4 * C)
        return dict(arch='gpt2', block_size=count('n_positions', 1024), vocab_size=count('vocab_size', 50257), n_layer=count('n_layer', 12),
                    n_head=count('n_head', 12), n_embd=C, bias=has_biases(path, config), activation=activation('activation_function', 'gelu_new'))
    C, H = count('hidden_size', 768), count('num_attention_heads', 6)
    need('num_key_value_heads', None, None, H)
    need('intermediate_size', 8192, 4 * C)
    need('head_dim', None, None, C // H)
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    rope = {'rope_theta': config.get('rope_theta', 10_000.0), 'rope_type': 'default', **(rope if isinstance(rope, dict) else {'rope_type': rope})}
    if rope != {'rope_theta': 10_000.0, 'rope_type': 'default'}:
        raise ValueError(f'{file}: rope_parameters = {rope} are not supported, accepted is rope_theta 10000 of rope_type default')
    return dict(arch='modern', block_size=count('max_position_embeddings', 2048), vocab_size=count('vocab_size', 50304),
                n_layer=count('num_hidden_layers', 12), n_head=H, n_embd=C, bias=False, activation=activation('hidden_act', 'relu2'))


def has_biases(folder, config):
    """A GPT-2 of ours without biases is exported with zeros in their place; it comes back without, unless they were trained since."""
    if config.get('bias', True) is not False:
        return True
    weights = open_weights(folder)
    return any(bool(weights[name].any()) for name in weights.keys() if name.endswith('.bias') and not BUFFERS.search(name))


def to_config(model_args, dtype, eot):
    """The dict of config.json for a GPTConfig's fields."""
    c = model_args
    common = dict(vocab_size=c['vocab_size'], bos_token_id=eot, eos_token_id=eot, dtype=str(dtype).split('.')[1])
    if c['arch'] == 'gpt2':
        return dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', n_positions=c['block_size'], n_embd=c['n_embd'], n_layer=c['n_layer'],
                    n_head=c['n_head'], n_inner=None, activation_function=ACTIVATIONS[c['activation']], bias=c['bias'],
                    **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), c['dropout']), **FIXED['gpt2'], **common)
    return dict(architectures=['NanoChatForCausalLM'], model_type='nanochat', max_position_embeddings=c['block_size'], hidden_size=c['n_embd'],
                intermediate_size=4 * c['n_embd'], num_hidden_layers=c['n_layer'], num_attention_heads=c['n_head'],
                num_key_value_heads=c['n_head'], hidden_act=ACTIVATIONS[c['activation']], attention_dropout=c['dropout'], pad_token_id=None,
                rope_parameters=dict(rope_theta=10_000.0, rope_type='default'), **FIXED['nanochat'], **common)


# -----------------------------------------------------------------------------
# names and layouts of weights

CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # GPT-2 as released keeps these matrices transposed
BUFFERS = re.compile(r'\.attn\.(bias|masked_bias)$|rotary_emb\.')  # causal masks and the like, which old files hold
NANOCHAT = {
    'transformer.wte.weight': ['model.embed_tokens.weight'],
    'lm_head.weight': ['lm_head.weight'],
    'attn.c_attn.weight': ['self_attn.q_proj.weight', 'self_attn.k_proj.weight', 'self_attn.v_proj.weight'],
    'attn.c_proj.weight': ['self_attn.o_proj.weight'],
    'mlp.c_fc.weight': ['mlp.fc1.weight'],
    'mlp.c_proj.weight': ['mlp.fc2.weight'],
}


def parts(name, tensor, arch):
    """Our weight as transformers sees it: [(their name, view of the tensor)], of which there are three for query, key and value."""
    if arch == 'gpt2':
        return [(name, tensor.t() if name.endswith(CONV1D) else tensor)]
    block = re.match(r'transformer\.h\.(\d+)\.', name)
    names = NANOCHAT[name[block.end():] if block else name]
    return list(zip((f'model.layers.{block[1]}.{n}' if block else n for n in names), tensor.chunk(len(names))))


@torch.no_grad()
def fill(model, path):
    """Copies the weights at path into the model, one at a time.

    raises  ValueError naming what is missing, unexpected, of another shape, or unreadable
    """
    weights, arch = open_weights(path), model.config.arch
    left = {name for name in weights.keys() if not BUFFERS.search(name)}
    prefix = {'gpt2': 'transformer.', 'modern': 'model.'}[arch] if path.is_dir() else ''
    bare = not any(name.startswith(prefix) for name in left)  # a model saved without its head has no prefix either
    missing = []
    for ours, tensor in model.named_parameters():
        for theirs, place in parts(ours, tensor, arch) if path.is_dir() else [(ours, tensor)]:
            theirs = theirs.removeprefix(prefix) if bare else theirs
            if theirs not in left:
                missing.append(theirs)
                continue
            left.remove(theirs)
            stored = weights[theirs]
            if stored.shape != place.shape:
                raise ValueError(f'{path}: {theirs} has shape {tuple(stored.shape)}, its configuration makes it {tuple(place.shape)}')
            if not place.is_contiguous():
                place, stored = place.t(), stored.t()  # torch is quicker at filling rows than columns
            place.copy_(stored)
    if arch == 'gpt2':
        left.discard('lm_head.weight')  # the same as wte
        left -= {name for name in left if name.endswith('.bias') and not model.config.bias}  # zeros, see has_biases()
    if missing or left:
        raise ValueError(f'{path} does not fit its configuration: {len(missing)} weights missing ({", ".join(missing[:3])}), '
                         f'{len(left)} unexpected ({", ".join(sorted(left)[:3])})')


# -----------------------------------------------------------------------------
# writing


def save(model, path, tokenizer=None):
    """Writes what from_pretrained() reads and transformers loads: a folder, or one .npz file. Returns the paths written.

    Padding of the vocabulary goes along, so that the weights come back as they are; generation_config.json keeps it from being drawn.
    """
    path, c, eot = Path(path), model.config, tokenizer.eot if tokenizer else None
    named = {name: tensor.detach() for name, tensor in model.named_parameters()}
    if path.suffix == '.npz':
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = dict(format=1, model_args=vars(c), tokenizer=tokenizer.meta() if tokenizer else None)
        write_atomically(path, lambda f: write_npz(f, settings, named))
        return [path]
    path.mkdir(parents=True, exist_ok=True)
    if c.arch == 'gpt2' and not c.bias:  # GPT2LMHeadModel always has biases
        named.update({name.removesuffix('weight') + 'bias': named['transformer.ln_f.weight'].new_zeros(tensor.size(0))
                      for name, tensor in named.items() if re.search(r'(ln_[12f]|c_attn|c_proj|c_fc)\.weight$', name)})
    tensors = dict(part for name, tensor in named.items() for part in parts(name, tensor, c.arch))
    dtype = next(iter(named.values())).dtype
    write_atomically(path / 'model.safetensors', lambda f: write_safetensors(f, tensors))
    n_tokens = tokenizer.vocab_size if tokenizer else c.vocab_size
    files = {'generation_config.json': dict(bos_token_id=eot, eos_token_id=eot, suppress_tokens=list(range(n_tokens, c.vocab_size)) or None)}
    if tokenizer:
        files['tokenizer.json'] = tokenizer.tokenizer_json()
        files['tokenizer_config.json'] = dict(tokenizer_config(tokenizer), model_max_length=c.block_size)
    files['config.json'] = to_config(vars(c), dtype, eot)
    for name, content in files.items():
        text = json.dumps(content, indent=None if name == 'tokenizer.json' else 2, ensure_ascii=False) + '\n'
        write_atomically(path / name, lambda f: f.write(text.encode('utf-8')))
    return [path / name for name in ('model.safetensors', *files)]


def raw_bytes(tensor):
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


# -----------------------------------------------------------------------------
# safetensors: 8 bytes with the length of a JSON header, the header, then the tensors' bytes, little-endian

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
LONGEST_HEADER = 100_000_000  # as the format's own reader has it


def open_weights(path):
    """What has keys() and gives the tensor of a name: an .npz file, model.safetensors, or what model.safetensors.index.json lists."""
    if path.is_file():
        return Npz(path)
    index, whole = path / 'model.safetensors.index.json', path / 'model.safetensors'
    if whole.is_file():
        return Safetensors([whole])
    if not index.is_file():
        torn = ', pytorch_model.bin would run code when read' if (path / 'pytorch_model.bin').exists() else ''
        raise FileNotFoundError(f'{path} has neither model.safetensors nor model.safetensors.index.json{torn}: '
                                'save it with transformers\' save_pretrained')
    try:
        names = set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values())
        valid = all(re.fullmatch(r'[\w.-]+\.safetensors', name) for name in names)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{index}: not an index of shards: {error or type(error).__name__}') from None
    if not valid:
        raise ValueError(f'{index}: names a file that is no .safetensors file of this folder')
    return Safetensors([path / name for name in sorted(names)])


class Safetensors:
    """The tensors of some .safetensors files by name; a tensor lives in the page cache until it is copied."""

    def __init__(self, paths):
        self.places = {}  # name -> (path, dtype, shape, first byte, number of bytes)
        for path in paths:
            self.places.update(read_header(path))

    def keys(self):
        return self.places.keys()

    def __getitem__(self, name):
        path, dtype, shape, start, n_bytes = self.places[name]
        if not n_bytes:
            return torch.empty(shape, dtype=dtype)
        mapped = np.memmap(path, np.uint8, mode='c', offset=start, shape=(n_bytes,))  # 'c': torch would warn of a read-only array
        return torch.from_numpy(mapped).view(dtype).view(shape)


def read_header(path):
    """{name: (path, dtype, shape, first byte, number of bytes)} of a .safetensors file, checked against its size."""
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing though model.safetensors.index.json names it')
    size = path.stat().st_size
    with open(path, 'rb') as f:
        length = int.from_bytes(f.read(8), 'little')
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f'{path} is not a whole .safetensors file: it has {size:,} bytes, its header alone would take {8 + length:,}')
        header = f.read(length)
    places, spans = {}, []
    try:
        entries = json.loads(header.decode('utf-8'), object_pairs_hook=without_repeats)
        entries.pop('__metadata__', None)
        for name, entry in entries.items():
            dtype, shape, (start, end) = DTYPES.get(entry['dtype']), tuple(entry['shape']), entry['data_offsets']
            width = dtype.itemsize if dtype else 1
            if set(map(type, (start, end, *shape))) != {int} or min(start, *shape) < 0 or dtype and end - start != math.prod(shape) * width:
                raise ValueError(f'{name} does not fill its place')
            if any(n >= 2**48 for n in shape):
                raise ValueError(f'{name} has shape {shape}')
            spans.append((start, end))
            if dtype or not BUFFERS.search(name):
                places[name] = (path, dtype, shape, 8 + length + start, end - start)
        spans.sort()
        if any(start != end for (_, end), (start, _) in zip([(0, 0), *spans], spans)):
            raise ValueError('its tensors overlap or leave gaps')
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a .safetensors file: {error or type(error).__name__}') from None
    end = max((start + n_bytes for _, _, _, start, n_bytes in places.values()), default=0)
    if end > size:
        # a map beyond the end would raise SIGBUS, which Python cannot catch
        raise ValueError(f'{path} has {size:,} bytes, its header says {end:,}: it was cut short, download or copy it again')
    for name, (_, dtype, *_) in places.items():
        if dtype is None:
            raise ValueError(f'{path}: {name} is {entries[name]["dtype"]}, accepted are {", ".join(DTYPES)}')
    return places


def without_repeats(pairs):
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError('a name stands in its header twice')
    return entries


def write_safetensors(f, tensors):
    """Writes {name: tensor}, one after the other, each made contiguous when its turn comes."""
    names, header, start = {dtype: name for name, dtype in DTYPES.items()}, {'__metadata__': {'format': 'pt'}}, 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[start, end])
        start = end
    text = json.dumps(header, separators=(',', ':')).encode('utf-8')
    text += b' ' * (-len(text) % 8)  # tensors begin at multiples of 8
    f.write(struct.pack('<Q', len(text)) + text)
    for tensor in tensors.values():
        f.write(raw_bytes(tensor))


# -----------------------------------------------------------------------------
# .npz: our names and layouts (a matrix is outputs x inputs), the tied head once as transformer.wte.weight; settings as JSON text

SETTINGS = 'settings'


def write_npz(f, settings, named):
    with zipfile.ZipFile(f, 'w') as archive:
        arrays = {SETTINGS: np.array(json.dumps(settings)), **named}
        for name, array in arrays.items():
            if isinstance(array, torch.Tensor):
                array = (array.float() if array.dtype == torch.bfloat16 else array).cpu().numpy()  # NumPy has no bfloat16
            with archive.open(name + '.npy', 'w', force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


class Npz:
    """The weights of an .npz file by name, each read when it is asked for; the zip's checksums are checked by reading."""

    def __init__(self, path):
        self.path = path
        try:
            self.arrays = np.load(path, allow_pickle=False)
            self.arrays.files  # a lone array has none
        except Exception as error:  # whatever broken bytes raise in zipfile and NumPy
            raise ValueError(f'{path} is not an .npz file: {error}') from None

    def keys(self):
        return set(self.arrays.files) - {SETTINGS}

    def array(self, name):
        try:
            array = self.arrays[name]
        except Exception as error:
            raise ValueError(f'{self.path}: {name} is unreadable: {error}') from None
        if not isinstance(array, np.ndarray):
            raise ValueError(f'{self.path}: {name} is no array')
        return array

    def __getitem__(self, name):
        array = self.array(name)
        if array.dtype not in (np.float64, np.float32, np.float16):
            raise ValueError(f'{self.path}: {name} is {array.dtype}, accepted are float64, float32, float16')
        return torch.from_numpy(array)


MODEL_ARGS = dict(block_size=int, vocab_size=int, n_layer=int, n_head=int, n_embd=int, bias=bool, arch=str, activation=str)


def read_npz_settings(path):
    """{'model_args', 'tokenizer'} of an .npz file that save() wrote."""
    try:
        settings = json.loads(str(Npz(path).array(SETTINGS)))
        args, tokenizer = {name: settings['model_args'][name] for name in MODEL_ARGS}, settings['tokenizer']
        if any(type(args[name]) is not kind for name, kind in MODEL_ARGS.items()):
            raise ValueError(f'its model_args are {args}')
        if tokenizer is not None:
            vocab_size_of(tokenizer)  # it raises where this is no tokenizer
        return dict(model_args=args, tokenizer=tokenizer)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} was not written by save_pretrained: {error}') from None
