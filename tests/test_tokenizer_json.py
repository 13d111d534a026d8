"""Any tokenizer.json: ids and text are AutoTokenizer's, the end of text is found, damaged and hostile files are one line."""
import json
import re

import pytest
from conftest import sentences
from test_train_tokenizer import CHINESE

from tokens.tokenizer import (
    CharTokenizer,
    fingerprint,
    load_tokenizer,
    tokenizer_meta,
    vocab_size_of,
)
from tokens.tokenizer_json import check_pattern, read_tokenizer_json, tokenizer_config

tokenizers = pytest.importorskip('tokenizers')
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

# the published patterns of Llama 3, Qwen 2 and GPT-4o
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace('{1,3}', '')
GPT4O = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = ['', ' ', 'Hello, world! It\'s 2024.', '  two  spaces\n\n\n\tand tabs \r\n', '天地玄黄，宇宙洪荒。abc天', '\U0001f600\U0001f468\u200d\U0001f469',
         'def f(x):\n    return x ** 2  # comment\n', 'naïve café ﬁ Ⅳ\u0301', '<|endoftext|>', 'a<|endoftext|><s></s>[SEP]b', '\u3000全角　１２３', 'x' * 300, "don 't do n't ' . ,"]
SPECIAL = ['<|endoftext|>', '<|pad|>']


def corpus():
    return [sentences(3000, 1), CHINESE * 3 + 'Naïve café 2024 def f(x): return x\n' * 3, *TEXTS[:8]]


def trained(model, trainer, **parts):
    engine = Tokenizer(model)
    for name, part in parts.items():
        setattr(engine, name, part)
    engine.train_from_iterator(corpus() * 2, trainer)
    return engine


def byte_level(pattern=None, normalizer=None):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern:
        before = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), 'isolated'), before])
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    parts = dict(normalizer=normalizer) if normalizer else {}
    return trained(models.BPE(), trainer, pre_tokenizer=before, decoder=decoders.ByteLevel(), **parts)


def byte_fallback():
    """As Llama 2 has it: spaces are ▁, unknown characters are bytes."""
    pieces = [*SPECIAL, *(f'<0x{i:02X}>' for i in range(256)), '▁', *'abcdefghijklmnopqrstuvwxyz天地']
    merges = [('▁', 'a'), ('t', 'h'), ('th', 'e'), ('▁', 'the')]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    engine = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    engine.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    engine.add_special_tokens(SPECIAL)
    return engine


def wordpiece():
    """As Chinese BERT has it."""
    special = ['[UNK]', '[CLS]', '[SEP]', '[PAD]', '[MASK]']
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    engine = trained(models.WordPiece(unk_token='[UNK]'), trainer, normalizer=normalizers.BertNormalizer(), decoder=decoders.WordPiece(),
                     pre_tokenizer=pre_tokenizers.BertPreTokenizer())
    ids = [(name, engine.token_to_id(name)) for name in ('[CLS]', '[SEP]')]
    engine.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=ids)
    engine.enable_truncation(5)
    engine.enable_padding(length=7)
    return engine


def unigram():
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=['<unk>', *SPECIAL], unk_token='<unk>', show_progress=False)
    return trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace(),
                   normalizer=normalizers.NFKC())


ENGINES = {'gpt2': byte_level, 'llama3': lambda: byte_level(LLAMA3), 'qwen2': lambda: byte_level(QWEN2, normalizers.NFC()),
           'gpt4o': lambda: byte_level(GPT4O), 'llama2': byte_fallback, 'wordpiece': wordpiece, 'unigram': unigram}
EXACT = ('gpt2', 'llama3', 'gpt4o')  # byte-level and without a normalizer: text comes back as it was


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('tokenizers')
    for name, make in ENGINES.items():
        (root / name).mkdir()
        make().save(str(root / name / 'tokenizer.json'))
        end, pad = ('[SEP]', '[PAD]') if name == 'wordpiece' else SPECIAL
        config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': end, 'pad_token': pad, 'clean_up_tokenization_spaces': name == 'wordpiece'}
        (root / name / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    return root


def auto(folder):
    return pytest.importorskip('transformers').AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize('name', ENGINES)
def test_ids_and_text_are_those_of_autotokenizer(folders, name):
    meta = json.loads(json.dumps(tokenizer_meta(folders / name)))
    ours, reference = load_tokenizer(meta), auto(folders / name)
    assert ours.kind == 'json' and ours.vocab_size == len(reference) == vocab_size_of(meta) and ours.eot == reference.eos_token_id
    assert ours.pad == reference.pad_token_id
    texts = [*TEXTS, *corpus()]
    plain = [reference.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
    assert [ours.encode(text) for text in texts] == plain == [ids.tolist() for ids in ours.encode_batch(texts)]
    assert [ours.encode_array(text).tolist() for text in texts] == plain
    special = [reference.encode(text, add_special_tokens=False) for text in texts]
    assert [ours.encode(text, allowed_special=ours.special) for text in texts] == special
    assert [ours.decode(ids) for ids in special] == [reference.decode(ids, clean_up_tokenization_spaces=False) for ids in special]


@pytest.mark.parametrize('name', ENGINES)
def test_text_is_streamed_token_by_token(folders, name):
    ours = load_tokenizer(tokenizer_meta(folders / name))
    for text in (TEXTS[2], TEXTS[4], TEXTS[5], corpus()[0]):
        ids = ours.encode(text)
        streamed = b''.join(ours.decode_bytes([i]) for i in ids)
        assert streamed == ours.decode_bytes(ids)
        assert streamed.decode('utf-8').removeprefix(' ') == ours.decode(ids).removeprefix(' ')
        assert ours.token_bytes()[ids].sum() == len(streamed) or '[UNK]' in ours.decode(ids) or '<unk>' in ours.decode(ids)
        if name in EXACT:
            assert streamed == text.encode('utf-8') and ours.token_bytes()[ids].sum() == len(text.encode('utf-8'))
    assert set(ours.token_bytes()[list(ours.special.values())]) == {0}


def test_a_tokenizer_keeps_its_fingerprint_and_goes_back_to_transformers(folders, tmp_path):
    prints = set()
    for name in ENGINES:
        meta = tokenizer_meta(folders / name)
        auto(folders / name).save_pretrained(tmp_path / name)
        again = tokenizer_meta(tmp_path / name)
        prints.add(fingerprint(meta))
        assert fingerprint(again) == fingerprint(meta) == fingerprint({**meta, 'config': {}, 'eot': None})
        (tmp_path / 'out').mkdir(exist_ok=True)
        ours = load_tokenizer(meta)
        for file, content in (('tokenizer.json', ours.tokenizer_json()), ('tokenizer_config.json', tokenizer_config(ours))):
            (tmp_path / 'out' / file).write_text(json.dumps(content), encoding='utf-8')
        reference = auto(tmp_path / 'out')
        assert reference.encode(TEXTS[2], add_special_tokens=False) == ours.encode(TEXTS[2])
        assert (reference.eos_token_id, reference.pad_token_id) == (ours.eot, ours.pad) and ours.bos == ours.eot
    assert len(prints) == len(ENGINES)


def test_a_token_that_only_the_config_names_gets_an_id_as_in_autotokenizer(folders, tmp_path):
    content = (folders / 'llama3/tokenizer.json').read_text(encoding='utf-8')
    (tmp_path / 'tokenizer.json').write_text(content, encoding='utf-8')
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': {'content': '<|im_end|>', '__type': 'AddedToken'}, 'pad_token': '<|pad|>',
              'added_tokens_decoder': {'400': {'content': '<tool>', 'special': False, 'normalized': False}}, 'chat_template': '{{ messages }}'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    ours, reference = load_tokenizer(tokenizer_meta(tmp_path)), auto(tmp_path)
    text = 'a<tool>b<|im_end|>'
    assert ours.encode(text, allowed_special=ours.special) == reference.encode(text) and ours.encode(text)[1] == 400
    assert (ours.eot, ours.vocab_size) == (reference.eos_token_id, len(reference)) == (401, 402)
    assert ours.meta()['config']['chat_template'] == '{{ messages }}'


def test_the_end_of_text_is_found_or_asked_for(folders, tmp_path):
    path = tmp_path / 'tokenizer.json'
    path.write_text((folders / 'wordpiece/tokenizer.json').read_text(encoding='utf-8'), encoding='utf-8')
    for name in (tmp_path, path):
        with pytest.raises(ValueError) as caught:
            tokenizer_meta(name)
        assert str(caught.value) == (f'tokenizer {name} does not say which token ends a document: name one by --eot=TOKEN, '
                                     'its special tokens are [UNK], [CLS], [SEP], [PAD], [MASK]')
    assert tokenizer_meta(path, eot='[SEP]')['eot'] == '[SEP]' and load_tokenizer(read_tokenizer_json(tmp_path)).eot is None
    with pytest.raises(ValueError, match=r'tokenizer.json: it has no token \[END\], which --eot names'):
        tokenizer_meta(path, eot='[END]')
    with pytest.raises(ValueError, match='--eot=x: the byte tokenizer ends documents with <|endoftext|>'):
        tokenizer_meta('byte', eot='x')
    # one file after the other says it, the last one counts
    for name, content, end in (('config.json', {'eos_token_id': 1}, '[CLS]'), ('generation_config.json', {'eos_token_id': [3, 1]}, '[PAD]'),
                               ('special_tokens_map.json', {'eos_token': {'content': '[MASK]'}}, '[MASK]'),
                               ('tokenizer_config.json', {'eos_token': '[SEP]'}, '[SEP]')):
        (tmp_path / name).write_text(json.dumps(content), encoding='utf-8')
        assert tokenizer_meta(tmp_path)['eot'] == end
    for config in ({'additional_special_tokens': 3}, {'added_tokens_decoder': [1]}, {'eos_token': 3}, {'pad_token': ['a']}):
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
        with pytest.raises(ValueError, match='tokenizer.json: '):
            tokenizer_meta(tmp_path)
    (tmp_path / 'ckpt.pt').write_bytes(bytes(9))
    with pytest.raises(FileNotFoundError, match='accepted are gpt2, byte, and a folder'):
        tokenizer_meta(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('pattern', [LLAMA3, QWEN2, GPT4O, r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|\s+(?!\S)', r' ?[^(\s|[.,!?…。，、।۔،])]+',
                                     r'(?:ab)++|\(a+\)+', r'[(a+)+]'])
def test_patterns_of_published_tokenizers_are_accepted(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize('pattern', ['(a+)+$', '(a|aa)*b', '(?:a{1,30}){1,30}$', r'((\p{L}+)?\s?)+$', 'a{1,30}+b', '(?i:[a-z]+)*$', '(.*a){25}'])
def test_patterns_of_exponential_time_are_refused(folders, tmp_path, pattern):
    content = json.loads((folders / 'llama3/tokenizer.json').read_text(encoding='utf-8'))
    content['pre_tokenizer']['pretokenizers'][0]['pattern'] = {'Regex': pattern}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    with pytest.raises(ValueError, match='repeats a group, which can take exponential time') as caught:
        tokenizer_meta(tmp_path)
    assert str(caught.value).startswith(f'{tmp_path / "tokenizer.json"}: ')
    with pytest.raises(ValueError, match='exponential'):
        load_tokenizer({'kind': 'json', 'tokenizer_json': json.dumps(content), 'eot': None, 'config': {}})
    with pytest.raises(ValueError, match='exponential'):
        load_tokenizer({'kind': 'bpe', 'merges': 'a b', 'pattern': pattern, 'special': ['<|endoftext|>']})


def test_meta_of_a_stranger_that_is_no_tokenizer(folders):
    meta = tokenizer_meta(folders / 'unigram')
    for changes in ({'tokenizer_json': None}, {'tokenizer_json': '{}'}, {'eot': 'no such token'}, {'eot': []}, {'config': 3}):
        with pytest.raises(ValueError) as caught:
            load_tokenizer(meta | changes)
        assert '\n' not in str(caught.value)
    text = json.loads(meta['tokenizer_json'])
    text['model']['unk_id'] = 10**6
    with pytest.raises(ValueError, match='tokenizer.json: '):
        load_tokenizer(meta | {'tokenizer_json': json.dumps(text)}).encode('a')


def test_half_a_surrogate_pair_becomes_a_replacement_character(folders):
    for name in ('byte', folders / 'llama3'):
        ours = load_tokenizer(tokenizer_meta(name))
        assert ours.encode('a\ud800b') == ours.encode('a\ufffdb') == ours.encode_batch(['a\ud800b'])[0].tolist()


def test_damaged_files_are_one_line(tmp_path):
    assert read_tokenizer_json(tmp_path) is None
    path = tmp_path / 'tokenizer.json'
    char = CharTokenizer('abc').tokenizer_json()
    holes = {**char, 'model': {**char['model'], 'vocab': {'a': 0, 'b': 2}}}
    for content in ('', '[]', '{}', '{"model": {"type": "BPE", "vocab": {}}}', '{"model": {"type": "WordLevel", "vocab": 3}}', json.dumps(char)[:-9],
                    '[' * 100_000, json.dumps(holes), json.dumps({**char, 'added_tokens': [{}]}), json.dumps({**char, 'pre_tokenizer': {'type': 'X'}}),
                    json.dumps({**char, 'model': {**char['model'], 'type': 'Unigram'}})):
        path.write_text(content, encoding='utf-8')
        with pytest.raises(ValueError, match=f'^{re.escape(str(path))}: ') as caught:
            read_tokenizer_json(tmp_path)
        assert '\n' not in str(caught.value)
