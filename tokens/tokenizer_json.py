"""Read and write tokenizer.json and the files beside it, the format of transformers.

Such files come from strangers: ids and patterns are checked before the `tokenizers` library runs.
"""

import hashlib
import json
import re
from pathlib import Path

from files import one_line, read_json

GPT2_MERGES_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'  # as in tiktoken
GPT2_META = {'kind': 'gpt2', 'sha256': GPT2_MERGES_SHA256}
# the possessive ++ avoids walking a run of letters or spaces twice
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# of the BPE trained here: Chinese has no spaces, so a run of Han characters is cut after 16; digits go by
# three, so that years do not become tokens
BPE_PATTERN = (r"""'(?:[sdmt]|ll|ve|re)| ?\p{Han}{1,16}| ?[\p{L}&&[^\p{Han}]]{1,32}| ?\p{N}{1,3}"""
               r"""| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""")
END = '<|endoftext|>'
# of bytes and of the BPE trained here; <|bos|> and <|unk|> are unused
SPECIAL_TOKENS = [END, '<|pad|>', '<|bos|>', '<|unk|>', '<|system|>', '<|user|>', '<|assistant|>']

# parts of each tokenizer.json written here, and of each special token in it
PLAIN = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None,
         'post_processor': None}
FLAGS = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
ROLES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
# the entries of tokenizer_config.json that meta() carries
KEPT = (*ROLES, 'additional_special_tokens', 'clean_up_tokenization_spaces', 'add_bos_token', 'add_eos_token',
        'chat_template')


# -----------------------------------------------------------------------------
# writing


def byte_characters():
    """Return {character: byte} by id. GPT-2's files write invisible bytes as U+0100 and following."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def bpe_tokens(merges):
    """Return the ordinary tokens by id, as vocab.json writes them."""
    tokens = dict.fromkeys(byte_characters())
    for merge in merges.splitlines():
        left, _, right = merge.partition(' ')
        if left not in tokens or right not in tokens or left + right in tokens:
            raise ValueError(f'the merge {merge!r} does not make a new token of two earlier ones')
        tokens[left + right] = None
    return list(tokens)


def split_by(pattern):
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def byte_level(pattern=GPT2_PATTERN):
    """Return the pre-tokenizer of a byte-level BPE."""
    step = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    if pattern == GPT2_PATTERN:  # built into the library
        return step
    return {'type': 'Sequence', 'pretokenizers': [split_by(pattern), {**step, 'use_regex': False}]}


def bpe_json(merges, pattern=GPT2_PATTERN, special=SPECIAL_TOKENS, tokens=()):
    """Return the content of a tokenizer.json. The merges imply the ordinary tokens, unless given."""
    vocab = {token: i for i, token in enumerate([*(tokens or bpe_tokens(merges)), *special])}
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '',
             'end_of_word_suffix': '', 'fuse_unk': False, 'vocab': vocab, 'merges': merges.splitlines()}
    added = [{'id': vocab[name], 'content': name, **FLAGS} for name in special]
    return {**PLAIN, 'added_tokens': added, 'pre_tokenizer': byte_level(pattern), 'decoder': byte_level(),
            'model': model}


def byte_json():
    byte_of = byte_characters()
    return bpe_json('', tokens=sorted(byte_of, key=byte_of.get))


def char_json(tokens):
    """Return the content of a tokenizer.json with a token per character."""
    model = {'type': 'WordLevel', 'vocab': {token: i for i, token in enumerate(tokens)}, 'unk_token': '<unk>'}
    return {**PLAIN, 'pre_tokenizer': split_by(r'[\s\S]'), 'decoder': {'type': 'Fuse'}, 'model': model}


def tokenizer_config(tokenizer):
    """Return the content of tokenizer_config.json. Ours use END as BOS, too."""
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    if tokenizer.kind == 'json':
        end = tokenizer.arguments['eot']
        unknown = tokenizer.content['model'].get('unk_token') or end
        roles = {'bos_token': end, 'pad_token': end, 'unk_token': unknown}
        return {**config, **roles, **tokenizer.arguments['config'], 'eos_token': end}
    if END in tokenizer.special:
        config |= dict.fromkeys(('bos_token', 'eos_token', 'pad_token', 'unk_token'), END)
    for role, name in (('pad_token', '<|pad|>'), ('unk_token', '<|unk|>')):
        if name in tokenizer.special:
            config[role] = name
    others = [name for name in tokenizer.special if name not in config.values()]
    if others:
        config['additional_special_tokens'] = others
    return config


def as_trained(meta):
    """Return meta() of a tokenizer for models trained here: a document begins after eot, which thus is BOS.

    Exported with the tokenizer's own BOS, which it never saw, a model lost 18.8 nats on an empty context. The
    tokenizer's chat template keeps its BOS.
    """
    if meta['kind'] != 'json':
        return meta
    config = {key: value for key, value in meta['config'].items() if not key.startswith('add_')}
    bos, template = config.get('bos_token', meta['eot']), config.get('chat_template')
    if bos != meta['eot'] and isinstance(template, str):
        config['chat_template'] = f'{{%- set bos_token = {json.dumps(bos)} -%}}\n{template}'
    content = {**json.loads(meta['tokenizer_json']), 'post_processor': None}  # it adds BOS or [CLS], [SEP]
    return {**meta, 'tokenizer_json': json.dumps(content, ensure_ascii=False),
            'config': {**config, 'bos_token': meta['eot']}}


# -----------------------------------------------------------------------------
# checks


def parse(text):
    """Return the content of a tokenizer.json. ValueError for a pattern that can take exponential time."""
    content = json.loads(text, object_hook=check_object)
    if content['model'].get('dropout'):
        content['model']['dropout'] = None  # it would make ids random
    return {**content, 'truncation': None, 'padding': None}


def check_object(value):
    if isinstance(value.get('Regex'), str):
        check_pattern(value['Regex'])
    return value


def check_pattern(pattern):
    """Raise ValueError if a regular expression repeats a group, as (a+)+ does."""
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
    """Return the library's tokenizer for the content of a tokenizer.json."""
    from tokenizers import Tokenizer
    return Tokenizer.from_str(json.dumps(content))


# -----------------------------------------------------------------------------
# reading


def read_tokenizer_json(path, eot=''):
    """Return meta() of the tokenizer.json, or of the folder that holds it; None if there is none."""
    path = file = Path(path)
    if path.is_dir():
        file = path / 'tokenizer.json'
    if not file.is_file() or file.suffix != '.json':
        return read_other_formats(path)
    with one_line(file):
        config = read_config(file.parent)
        content = with_named_tokens(parse(file.read_text(encoding='utf-8-sig')), config)
        ids = vocabulary(content)
        if eot and eot not in ids:
            raise ValueError(f'it has no token {eot}, which --eot names')
        short = short_meta(content, ids)
        if short and eot in ('', END):
            return short
        kept = {key: config[key] for key in KEPT if config.get(key)}
        return {'kind': 'json', 'tokenizer_json': json.dumps(content, ensure_ascii=False),
                'eot': eot or end_token(config, ids), 'config': kept}


def read_other_formats(folder):
    """Return GPT-2's meta() if its merges.txt is there, None if there is no tokenizer."""
    merges = folder / 'merges.txt'
    if merges.is_file() and are_gpt2s(read_merges(merges)):
        return dict(GPT2_META)
    for pattern in ('vocab.*', 'merges.txt', '*.model'):
        for file in folder.glob(pattern):
            raise ValueError(f'{file} is a tokenizer in a format that is not read: save it as tokenizer.json '
                             "with transformers' AutoTokenizer, or name the tokenizer with --tokenizer")
    return None


def read_merges(path):
    """Return the text of a merges file, without the version in its first line."""
    return '\n'.join(path.read_text(encoding='utf-8').splitlines()[1:])


def are_gpt2s(merges):
    return hashlib.sha256(f'#version: 0.2\n{merges}\n'.encode()).hexdigest() == GPT2_MERGES_SHA256


def read_config(folder):
    """Return the entries of tokenizer_config.json and of the files that it overrides."""
    config = {}
    for name in ('config', 'generation_config', 'special_tokens_map', 'tokenizer_config'):
        file = folder / f'{name}.json'
        if file.is_file():
            config |= read_json(file)
    config |= {role: token_name(config[role]) for role in ROLES if role in config}
    # transformers 5 renamed additional_special_tokens
    others = config.get('extra_special_tokens') or config.get('additional_special_tokens') or []
    if isinstance(others, dict):
        others = others.values()
    config['additional_special_tokens'] = [token_name(other) for other in others]
    template = folder / 'chat_template.jinja'
    if template.is_file():
        config['chat_template'] = template.read_text(encoding='utf-8')
    return config


def token_name(value):
    if isinstance(value, dict):
        return value.get('content')
    return value


def with_named_tokens(content, config):
    """Return the content as the library writes it, with the tokens that only read_config() names."""
    from tokenizers import AddedToken
    engine, entries = load_engine(content), config.get('added_tokens_decoder') or {}
    tokens = []
    for i in sorted(entries, key=int):
        flags = {flag: entries[i][flag] for flag in FLAGS if flag in entries[i]}
        tokens.append(AddedToken(entries[i]['content'], **flags))
    names = [config.get(role) for role in ROLES] + config['additional_special_tokens']
    tokens += [AddedToken(name, special=True, normalized=False) for name in names if name]
    present = {token.content for token in engine.get_added_tokens_decoder().values()}
    engine.add_tokens([token for token in tokens if token.content not in present])
    return json.loads(engine.to_str())


def end_token(config, ids):
    """Return the token that ends a document: eos_token, else the one with eos_token_id, else None."""
    if config.get('eos_token') in ids:
        return config['eos_token']
    number = config.get('eos_token_id')
    if isinstance(number, list):
        number = number[0]
    return next((token for token, i in ids.items() if i == number), None)


def short_meta(content, ids):
    """Return a short meta() of characters, bytes, GPT-2's BPE or a BPE trained here, None for others."""
    model, added, names = content['model'], content['added_tokens'], sorted(ids, key=ids.get)
    special = sorted((token['content'] for token in added), key=ids.get)
    merges = '\n'.join(map(' '.join, model.get('merges') or []))
    if model['type'] == 'WordLevel' and all(len(name) == 1 for name in names):
        meta, written = {'kind': 'char', 'chars': ''.join(names)}, char_json(names)
    elif model['type'] != 'BPE' or END not in special:
        return None
    elif not merges:
        meta, written = {'kind': 'byte'}, byte_json()
    elif are_gpt2s(merges):
        meta, written = dict(GPT2_META), bpe_json(merges, special=[END])
    elif content['pre_tokenizer'] == byte_level(BPE_PATTERN) and are_trained(content):
        meta = {'kind': 'bpe', 'merges': merges, 'pattern': BPE_PATTERN, 'special': special}
        written = bpe_json(merges, BPE_PATTERN, special)
    else:
        return None
    same = all(written[key] == content[key] for key in ('normalizer', 'pre_tokenizer'))
    strips = any(token['lstrip'] or token['rstrip'] for token in added)
    if strips or not same or vocabulary(written) != ids:
        return None
    return meta


def are_trained(content):
    """Whether merging makes every token out of its own text, as training does.

    Else tiktoken, which merges by the rank of the token, gives other ids than `tokenizers`.
    """
    model = load_engine(content).model
    ordinary = content['model']['vocab'].keys() - {token['content'] for token in content['added_tokens']}
    return all(len(model.tokenize(token)) == 1 for token in ordinary)
