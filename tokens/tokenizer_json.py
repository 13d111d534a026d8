"""Read, check and write tokenizer.json and the files beside it, the format of transformers.

    meta = read_tokenizer_json('SmolLM2-135M')    # for load_tokenizer(meta)

The files come from strangers: ids and regular expressions are checked before the `tokenizers` library runs.
"""

import contextlib
import hashlib
import json
import re
from pathlib import Path

from files import read_json

GPT2_MERGES_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'  # as in tiktoken
GPT2_META = {'kind': 'gpt2', 'sha256': GPT2_MERGES_SHA256}
# GPT-2's pre-tokenization. The possessive ++ avoids walking a run of letters or spaces twice.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Pre-tokenization of the BPE trained here. Chinese has no spaces, so a run of Han characters is cut after 16
# (0.05% more tokens), a run of other letters after 32. Digits go by three, as in GPT-4, so that years do not
# become tokens.
BPE_PATTERN = (r"""'(?:[sdmt]|ll|ve|re)| ?\p{Han}{1,16}| ?[\p{L}&&[^\p{Han}]]{1,32}| ?\p{N}{1,3}"""
               r"""| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""")
END = '<|endoftext|>'
# Special tokens of bytes and of the BPE trained here. <|bos|> and <|unk|> are unused: they keep older ids.
SPECIAL_TOKENS = [END, '<|pad|>', '<|bos|>', '<|unk|>', '<|system|>', '<|user|>', '<|assistant|>']

PLAIN = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None,
         'post_processor': None}
FLAGS = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
ROLES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
KEPT = (*ROLES, 'additional_special_tokens', 'clean_up_tokenization_spaces', 'add_bos_token', 'add_eos_token',
        'chat_template')
OTHER_FORMATS = ('vocab.txt', 'spiece.model', 'tokenizer.model', 'sentencepiece.bpe.model', 'vocab.json',
                 'merges.txt')


# -----------------------------------------------------------------------------
# writing


def byte_characters():
    """Return {character: byte} of GPT-2's files, in the order of the ids of single bytes.

    A byte that is visible in Latin-1 stands for itself. The other 68 are written as U+0100 and following.
    """
    visible = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def bpe_tokens(merges):
    """Return the ordinary tokens by id, as vocab.json writes them."""
    tokens = dict.fromkeys(byte_characters())
    for merge in merges:
        left, _, right = merge.partition(' ')
        if left not in tokens or right not in tokens or left + right in tokens:
            raise ValueError(f'the merge {merge!r} does not make a new token of two earlier ones')
        tokens[left + right] = None
    return list(tokens)


def bpe_json(tokens, merges, pattern, special):
    is_gpt2s = pattern == GPT2_PATTERN
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': is_gpt2s}
    split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
    sequence = {'type': 'Sequence', 'pretokenizers': [split, byte_level]}
    vocab = {token: i for i, token in enumerate([*tokens, *special])}
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '',
             'end_of_word_suffix': '', 'fuse_unk': False, 'vocab': vocab, 'merges': merges}
    added = [{'id': vocab[name], 'content': name, **FLAGS} for name in special]
    return {**PLAIN, 'added_tokens': added, 'pre_tokenizer': byte_level if is_gpt2s else sequence,
            'decoder': {**byte_level, 'use_regex': True}, 'model': model}


def byte_json():
    byte_of = byte_characters()
    return bpe_json(sorted(byte_of, key=byte_of.get), [], GPT2_PATTERN, SPECIAL_TOKENS)


def char_json(tokens):
    """Return the content of a tokenizer.json with a token per character. Other characters are an error."""
    split = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False}
    vocab = {token: i for i, token in enumerate(tokens)}
    return {**PLAIN, 'pre_tokenizer': split, 'decoder': {'type': 'Fuse'},
            'model': {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<unk>'}}


def tokenizer_config(tokenizer):
    """Return the content of tokenizer_config.json. In ours, END begins, ends and separates documents."""
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    if tokenizer.kind == 'json':
        config.update(tokenizer.config)
        if tokenizer.eot_token:
            config['eos_token'] = tokenizer.eot_token
            config.setdefault('pad_token', tokenizer.eot_token)
        return config
    if tokenizer.eot is not None:
        config.update(bos_token=END, eos_token=END, pad_token=END)
    for role, name in (('pad_token', '<|pad|>'), ('unk_token', '<|unk|>')):
        if name in tokenizer.special:
            config[role] = name
    others = [name for name in tokenizer.special if name not in config.values()]
    if others:
        config['additional_special_tokens'] = others
    return config


# -----------------------------------------------------------------------------
# checks


@contextlib.contextmanager
def one_line(where):
    """Turn the errors of damaged content, and panics of `tokenizers`, into a ValueError that says where."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
            raise
        raise ValueError(f'{where}: {error or type(error).__name__}') from None


def parse(text):
    """Return the content of a tokenizer.json. ValueError for a pattern that can take exponential time."""
    content = json.loads(text)
    for key in ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder'):
        for pattern in regular_expressions(content.setdefault(key, None)):
            check_pattern(pattern)
    if content['model'].get('dropout'):
        content['model']['dropout'] = None  # it would make ids random
    return content


def regular_expressions(part):
    if isinstance(part, dict):
        if isinstance(part.get('Regex'), str):
            yield part['Regex']
        part = list(part.values())
    if isinstance(part, list):
        for value in part:
            yield from regular_expressions(value)


def check_pattern(pattern):
    """Raise ValueError if the pattern repeats a group, as (a+)+ does: a match could take exponential time."""
    plain = re.sub(r'\\[pPx]\{[^}]*\}|\\.', 'x', pattern, flags=re.DOTALL)
    plain = re.sub(r'\[(?:[^][]|\[[^][]*\])*\]', 'x', plain)  # classes may hold classes: [\p{L}&&[^\p{Han}]]
    if re.search(r'\)(?:[*+](?!\+)|\{)|\}[*+{]|[*+]\{', plain):
        raise ValueError(f'the regular expression {pattern!r} repeats a group, which can take exponential '
                         'time: a tokenizer with such a pattern is not used')


def vocabulary(content):
    """Return {token: id} of the content of a tokenizer.json. ValueError unless the ids are 0 to V - 1."""
    vocab = content['model']['vocab']
    if isinstance(vocab, list):  # Unigram: pairs of token and score
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    ids = {**vocab, **{token['content']: token['id'] for token in content['added_tokens']}}
    gaps = set(range(len(ids))) - set(ids.values())
    if gaps:
        raise ValueError(f'no token has the id {min(gaps)}, though there are {len(ids)} tokens')
    return ids


def load_engine(content):
    """Return the library's tokenizer for the content of a tokenizer.json, without truncation and padding."""
    from tokenizers import Tokenizer as Engine
    engine = Engine.from_str(json.dumps(content))
    engine.no_truncation()
    engine.no_padding()
    return engine


# -----------------------------------------------------------------------------
# reading


def read_tokenizer_json(path, eot=''):
    """Return meta() of the tokenizer in a folder of transformers or a tokenizer.json, None if there is none.

    eot     the token that ends a document, instead of the one that the folder names
    """
    path = Path(path)
    file = path / 'tokenizer.json' if path.is_dir() else path
    if not file.is_file() or file.suffix != '.json':
        return read_other_formats(path)
    with one_line(file):
        stored = read_config(file.parent)
        content = with_named_tokens(parse(file.read_text(encoding='utf-8-sig')), stored)
        ids = vocabulary(content)
        short = short_meta(content, ids)
    if eot and eot not in ids:
        raise ValueError(f'--eot={eot}: {file} has no such token')
    if short and eot in ('', END):
        return short
    config = {key: stored[key] for key in KEPT if stored.get(key)}
    eot = eot or end_token(file.parent, config.get('eos_token'), ids)
    text = json.dumps(content, ensure_ascii=False)
    return {'kind': 'json', 'tokenizer_json': text, 'eot': eot, 'config': config}


def read_other_formats(folder):
    """Return GPT-2's meta() if its merges.txt is there, None if there is no tokenizer."""
    merges = folder / 'merges.txt'
    if merges.is_file() and are_gpt2s(read_merges(merges)):
        return dict(GPT2_META)
    for name in OTHER_FORMATS:
        if (folder / name).is_file():
            raise ValueError(f'{folder / name} is a tokenizer in a format that is not read: save it as '
                             "tokenizer.json with transformers' AutoTokenizer, or name the tokenizer with "
                             '--tokenizer')
    return None


def read_merges(path):
    """Return the lines of a merges file, without the version in its first line."""
    return path.read_text(encoding='utf-8').splitlines()[1:]


def are_gpt2s(merges):
    text = '\n'.join(['#version: 0.2', *merges, ''])
    return hashlib.sha256(text.encode('utf-8')).hexdigest() == GPT2_MERGES_SHA256


def read_config(folder):
    """Return the entries of tokenizer_config.json and the older special_tokens_map.json, tokens by name."""
    stored = read_object(folder / 'special_tokens_map.json') | read_object(folder / 'tokenizer_config.json')
    stored.update({role: token_name(stored[role]) for role in ROLES if role in stored})
    # transformers 5 renamed additional_special_tokens
    others = stored.get('extra_special_tokens') or stored.get('additional_special_tokens') or []
    others = others.values() if isinstance(others, dict) else others
    stored['additional_special_tokens'] = [token_name(other) for other in others]
    template = folder / 'chat_template.jinja'
    if template.is_file():
        stored['chat_template'] = template.read_text(encoding='utf-8')
    return stored


def read_object(path):
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f'{path} must hold a JSON object')
    return value


def token_name(value):
    return value.get('content') if isinstance(value, dict) else value


def with_named_tokens(content, stored):
    """Return the content as the library writes it, with the tokens that only tokenizer_config.json names."""
    from tokenizers import AddedToken
    engine, tokens = load_engine(content), []
    entries = stored.get('added_tokens_decoder') or {}
    for entry in [entries[i] for i in sorted(entries, key=int)]:
        tokens.append(AddedToken(entry['content'], **{flag: entry[flag] for flag in FLAGS if flag in entry}))
    names = [stored.get(role) for role in ROLES] + stored['additional_special_tokens']
    tokens += [AddedToken(name, special=True, normalized=False) for name in names if name]
    present = {token.content for token in engine.get_added_tokens_decoder().values()}
    engine.add_tokens([token for token in tokens if token.content not in present])
    return json.loads(engine.to_str())


def end_token(folder, eos_token, ids):
    """Return the token that ends a document: eos_token, else eos_token_id of the model's files, else None."""
    if isinstance(eos_token, str) and eos_token in ids:
        return eos_token
    name_of = {i: name for name, i in ids.items()}
    for name in ('generation_config.json', 'config.json'):
        eos = read_object(folder / name).get('eos_token_id')
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if isinstance(eos, int) and eos in name_of:
            return name_of[eos]
    return None


def short_meta(content, ids):
    """Return a short meta() for characters, bytes, GPT-2's BPE and the BPE trained here, None for others."""
    special = sorted((token['content'] for token in content['added_tokens']), key=ids.get)
    meta = expected = None
    if content['model']['type'] == 'WordLevel' and all(len(token) == 1 for token in ids):
        chars = ''.join(sorted(ids, key=ids.get))
        meta, expected = {'kind': 'char', 'chars': chars}, char_json(chars)
    elif content['model']['type'] == 'BPE' and END in special:
        pairs = content['model']['merges']
        merges = [pair if isinstance(pair, str) else ' '.join(pair) for pair in pairs]
        if not merges:
            meta, expected = {'kind': 'byte'}, byte_json()
        elif are_gpt2s(merges):
            meta, expected = dict(GPT2_META), bpe_json(bpe_tokens(merges), merges, GPT2_PATTERN, [END])
        elif BPE_PATTERN in regular_expressions(content['pre_tokenizer']) and are_trained(content):
            meta = {'kind': 'bpe', 'merges': '\n'.join(merges), 'pattern': BPE_PATTERN, 'special': special}
            expected = bpe_json(bpe_tokens(merges), merges, BPE_PATTERN, special)
    if meta is None or any(token['lstrip'] or token['rstrip'] for token in content['added_tokens']):
        return None
    same = all(expected[key] == content[key] for key in ('normalizer', 'pre_tokenizer'))
    return meta if same and vocabulary(expected) == ids else None


def are_trained(content):
    """Whether merging makes every token out of its own text, as training does.

    Only then does merging by the rank of the token (tiktoken) give the ids of merging by the rank of the pair
    (tokenizers).
    """
    model = load_engine(content).model
    ordinary = content['model']['vocab'].keys() - {token['content'] for token in content['added_tokens']}
    return all(len(model.tokenize(token)) == 1 for token in ordinary)
