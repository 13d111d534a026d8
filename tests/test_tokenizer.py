"""tokens/tokenizer.py against tiktoken's own GPT-2, the bytes of UTF-8, and transformers."""
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train_tokenizer import corpus

from corpus.train_tokenizer import save_tokenizer, train_bpe
from tokens.tokenizer import (
    GPT2_META,
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    fingerprint,
    load_tokenizer,
    opening,
    read_tokenizer_json,
    tokenizer_meta,
)

SHARED = Path(__file__).resolve().parents[1].parent / 'shared' / 'data'


@pytest.fixture(scope='module')
def gpt2():
    pytest.importorskip('tiktoken')
    merges = SHARED / 'gpt2_bpe' / 'vocab.bpe'
    if not merges.exists():
        pytest.skip(f'{merges} is absent')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FLATGPT_CACHE', str(merges.parent))
        return GPT2Tokenizer()


@pytest.fixture(scope='module')
def reference(gpt2):
    """tiktoken's own gpt2, built by tiktoken from the two files that it expects."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', '')
        ranks = data_gym_to_mergeable_bpe_ranks(str(SHARED / 'gpt2_bpe/vocab.bpe'), str(SHARED / 'gpt2_bpe/encoder.json'))
    return tiktoken.Encoding('reference', pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 50256})

# -----------------------------------------------------------------------------
# characters

@given(st.text())
def test_char_round_trip(text):
    tokenizer = CharTokenizer(''.join(sorted(set(text + 'a'))))
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_char_ids_are_those_of_nanogpt():
    text = 'to be or not to be\n'
    chars = sorted(set(text))
    assert CharTokenizer(''.join(chars)).encode(text) == [chars.index(char) for char in text]


@pytest.mark.parametrize('char, code', [
    ('X', 'U+0058'), ('\u00e9', 'U+00E9'), ('\U0001f600', 'U+1F600'), ('\ud800', 'U+D800')])
def test_unknown_character_is_named(char, code):
    with pytest.raises(ValueError) as caught:
        CharTokenizer('abc\n').encode('abc' + char + 'Y')
    assert str(caught.value) == f'character {char!r} ({code}) at position 3 is not among the 4 characters of the tokenizer'


@pytest.mark.parametrize('chars', ['', 'aa', '\ud800'])
def test_characters_that_make_no_tokenizer(chars):
    with pytest.raises(ValueError):
        CharTokenizer(chars)


@pytest.mark.parametrize('bad', [3, -1])
def test_id_outside_the_vocabulary_is_named(bad):
    with pytest.raises(ValueError, match=f'token id {bad} is outside the vocabulary of 3 tokens'):
        CharTokenizer('abc').decode([0, bad])

# -----------------------------------------------------------------------------
# GPT-2

def test_gpt2_tokens_are_tiktokens(gpt2, reference):
    assert gpt2.vocab_size == reference.n_vocab == 50257 and gpt2.eot == reference.eot_token == 50256
    assert [gpt2.decode_bytes([i]) for i in range(50257)] == [reference.decode_single_token_bytes(i) for i in range(50257)]


@pytest.mark.parametrize('file', ['english/tinyshakespeare.txt', 'chinese/debian_reference_zh_cn.txt'])
def test_gpt2_ids_are_tiktokens(gpt2, reference, file):
    text = (SHARED / file).read_text(encoding='utf-8')[:200_000]
    assert gpt2.encode(text) == reference.encode_ordinary(text)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(" \n\t\u00a0\u3000'sdmtrelv\u00e9A1\u00b2\u4f60\U0001f600.<|>")) | st.text())
def test_gpt2_ids_and_round_trip_of_any_text(gpt2, reference, text):
    ids = gpt2.encode(text)
    assert ids == reference.encode_ordinary(text) == gpt2.encode_array(text).tolist()
    assert gpt2.decode(ids) == text and gpt2.decode_bytes(ids) == text.encode()
    assert gpt2.token_bytes()[ids].sum() == len(text.encode())


def test_endoftext_is_text_unless_allowed(gpt2):
    assert gpt2.eot not in gpt2.encode('a<|endoftext|>b')
    assert gpt2.encode('a<|endoftext|>b', allowed_special={'<|endoftext|>'}) == [64, 50256, 65]
    assert gpt2.decode([64, 50256]) == 'a<|endoftext|>' and gpt2.token_bytes()[50256] == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from([*' \n\r\u00a0a1\u4f60\ud83d\ude00<|>', '<|endoftext|>', '<|endof'])).map(''.join)))
def test_gpt2_encodes_a_batch_as_text_by_text(gpt2, texts):
    assert [ids.tolist() for ids in gpt2.encode_batch(texts)] == [gpt2.encode(text) for text in texts]


def test_a_batch_is_encoded_text_by_text_if_another_special_token_begins_with_end_of_text():
    tokenizer = BPETokenizer('a b\nb c\nab c', special=['<|endoftext|>', '<|endoftext|>a'])
    texts = ['b', 'abc', 'b<|endoftext|>b']
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_gpt2_decodes_half_a_character_and_names_a_padded_id(gpt2):
    assert gpt2.decode(gpt2.encode('\U0001f600')[:1]) == '\ufffd'
    with pytest.raises(ValueError, match='token id 50257 is outside the vocabulary of 50257 tokens'):
        gpt2.decode([50257])

# -----------------------------------------------------------------------------
# bytes, and byte-level BPE

ANY_TEXT = st.text() | st.lists(st.sampled_from([*" \n\t\u00a0\u3000'sdmtrelv\u00e9A127\u00b2天地玄黄，。\u3007\U00020000\U0001f600.<|>\u0e01\u0301", 'a' * 40, '天' * 20,
                                              *SPECIAL_TOKENS])).map(''.join)


@pytest.fixture(scope='module')
def bpe():
    pytest.importorskip('tokenizers')
    return train_bpe(corpus(), 400)


@pytest.fixture(scope='module')
def bpe_there(bpe, tmp_path_factory):
    """The same, as transformers reads it from the folder written."""
    transformers, folder = pytest.importorskip('transformers'), tmp_path_factory.mktemp('bpe')
    save_tokenizer(bpe, folder)
    return transformers.AutoTokenizer.from_pretrained(folder), folder


@given(st.text())
def test_byte_ids_are_the_bytes(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode() == tokenizer.decode_bytes(ids) and tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 263 and tokenizer.token_bytes().tolist() == [1] * 256 + [0] * 7


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_bpe_ids_are_those_of_transformers_and_the_round_trip_of_any_text(bpe, bpe_there, text):
    ids = bpe.encode(text, allowed_special=bpe.special)
    assert bpe_there[0].encode(text) == ids and bpe.decode(ids) == text
    plain = bpe.encode(text)
    assert max(plain, default=0) < bpe.eot and bpe.encode_array(text).tolist() == plain
    assert bpe.decode(plain) == text and bpe.token_bytes()[plain].sum() == len(text.encode())


def test_bpe_ids_of_every_code_point_are_those_of_transformers(bpe, bpe_there):
    codes = [*range(0xd800), *range(0xe000, 0x34000), *range(0xe0000, 0xe0200)]  # beyond and between nothing is assigned, or to private use
    text = ''.join(f'{chr(code)}{"a天 " if code % 7 == 0 else ""}' for code in codes)
    for start in range(0, len(text), 100_000):
        piece = text[start:start + 100_000]
        assert bpe_there[0].encode(piece) == bpe.encode(piece)


def test_bpe_has_its_special_tokens_and_transformers_knows_their_roles(bpe, bpe_there):
    there = bpe_there[0]
    assert list(bpe.special) == SPECIAL_TOKENS == list(ByteTokenizer().special) and list(bpe.special.values()) == list(range(393, 400))
    assert (there.eos_token_id, there.bos_token_id, there.pad_token_id, there.unk_token_id) == (393, 393, 394, 396) and len(there) == 400
    assert there.convert_tokens_to_ids(SPECIAL_TOKENS) == list(bpe.special.values()) == there.encode(''.join(SPECIAL_TOKENS))
    assert bpe.encode('<|user|>', allowed_special=['<|pad|>']) == bpe.encode('<|user|>') != [bpe.special['<|user|>']]
    assert there.decode(bpe.encode('天地'), skip_special_tokens=True) == '天地'


def test_bpe_comes_back_from_its_folder_and_from_one_that_transformers_wrote(bpe, bpe_there, tmp_path):
    bpe_there[0].save_pretrained(tmp_path / 'again')
    assert read_tokenizer_json(bpe_there[1]) == read_tokenizer_json(tmp_path / 'again') == tokenizer_meta(str(bpe_there[1])) == bpe.meta()
    save_tokenizer(ByteTokenizer(), tmp_path / 'byte')
    assert read_tokenizer_json(tmp_path / 'byte') == tokenizer_meta('byte') == {'kind': 'byte'}
    assert [path.name for path in sorted((tmp_path / 'byte').iterdir())] == ['merges.txt', 'tokenizer.json', 'tokenizer_config.json', 'vocab.json']


def test_merges_that_no_training_makes_keep_the_ids_of_transformers(tmp_path):
    # 'abc' is made of ab + c by the ranks of the tokens, but where bc came first, a and bc are left standing
    save_tokenizer(BPETokenizer('b c\na b\nab c'), tmp_path)
    meta = read_tokenizer_json(tmp_path)
    assert meta['kind'] == 'json' and load_tokenizer(meta).encode('abc') == [64, 256]
    save_tokenizer(BPETokenizer('a b\nb c\nab c'), tmp_path)
    assert read_tokenizer_json(tmp_path)['kind'] == 'bpe'



def test_a_batch_has_the_ids_of_its_texts(bpe):
    for tokenizer in (bpe, ByteTokenizer(), CharTokenizer('\n abc')):
        assert [ids.tolist() for ids in tokenizer.encode_batch(['a cab', '', 'b'])] == [tokenizer.encode(text) for text in ('a cab', '', 'b')]

# -----------------------------------------------------------------------------
# meta

def test_meta_survives_json_and_rebuilds_the_tokenizer(gpt2, bpe, monkeypatch):
    monkeypatch.setenv('FLATGPT_CACHE', str(SHARED / 'gpt2_bpe'))
    for tokenizer in (gpt2, bpe, ByteTokenizer(), CharTokenizer('\n abc')):
        meta = json.loads(json.dumps(tokenizer.meta()))
        rebuilt = load_tokenizer(meta)
        assert rebuilt.encode('a cab\n') == tokenizer.encode('a cab\n') and rebuilt.meta() == meta
        assert fingerprint(meta) == fingerprint(tokenizer.meta())


def test_fingerprint_is_of_the_content_not_of_the_order():
    canonical = hashlib.sha256(b'{"chars":"ab","kind":"char"}').hexdigest()[:12]
    assert fingerprint({'kind': 'char', 'chars': 'ab'}) == fingerprint({'chars': 'ab', 'kind': 'char'}) == canonical
    assert fingerprint({'kind': 'char', 'chars': 'ba'}) != canonical


def bpe_meta(**changes):
    return {'kind': 'bpe', 'merges': 'a b\nab c', 'pattern': '.', 'special': ['<|endoftext|>']} | changes


def test_bpe_meta_of_the_least():
    assert load_tokenizer(bpe_meta()).encode('abcab') == [64, 65, 66, 64, 65] and load_tokenizer(bpe_meta(pattern='.+')).encode('abcab') == [257, 256]


@pytest.mark.parametrize('meta', [
    None, {}, {'kind': 'spm'}, {'kind': 'char'}, {'kind': 'gpt2', 'sha256': '0'}, {'kind': []}, bpe_meta(merges=['a b']),
    bpe_meta(merges='ab c'), bpe_meta(merges='a b\na b'), bpe_meta(merges='a b c'), bpe_meta(pattern=None), bpe_meta(pattern='('),
    bpe_meta(special=[]), bpe_meta(special=['<|endoftext|>', 3])])
def test_meta_that_describes_no_tokenizer(meta):
    with pytest.raises(ValueError):
        load_tokenizer(meta)

# -----------------------------------------------------------------------------
# tokenizer.json

def written(folder, tokenizer):
    path = folder / 'tokenizer.json'
    path.write_text(json.dumps(tokenizer.tokenizer_json()), encoding='utf-8')
    return path


@given(st.text(min_size=1))
def test_characters_have_the_same_ids_in_the_tokenizers_package(tmp_path_factory, text):
    tokenizers, folder = pytest.importorskip('tokenizers'), tmp_path_factory.mktemp('x')
    ours = CharTokenizer(''.join(sorted(set(text), reverse=True)))
    theirs = tokenizers.Tokenizer.from_file(str(written(folder, ours)))
    assert theirs.encode(text).ids == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert read_tokenizer_json(folder) == ours.meta()


@pytest.fixture(scope='module')
def gpt2_there(gpt2, tmp_path_factory):
    tokenizers, folder = pytest.importorskip('tokenizers'), tmp_path_factory.mktemp('gpt2')
    theirs = tokenizers.Tokenizer.from_file(str(written(folder, gpt2)))
    assert read_tokenizer_json(folder) == GPT2_META
    return theirs


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*" \n\t\u00a0\u3000'sdmtrelv\u00e9A1\u00b2\u4f60\U0001f600.<|>", '<|endoftext|>', ' the', "'ll"])).map(''.join))
def test_gpt2_has_the_same_ids_in_the_tokenizers_package(gpt2, gpt2_there, text):
    ids = gpt2.encode(text, allowed_special={'<|endoftext|>'})
    assert gpt2_there.encode(text).ids == ids and gpt2_there.decode(ids, skip_special_tokens=False) == text


def test_the_two_old_files_of_gpt2_are_known_with_any_line_end(gpt2, tmp_path):
    merges = (SHARED / 'gpt2_bpe/vocab.bpe').read_bytes()
    for content in (merges, merges.replace(b'\n', b'\r\n')):
        (tmp_path / 'merges.txt').write_bytes(content)
        assert read_tokenizer_json(tmp_path) == GPT2_META


def test_datasets_of_nanogpt_with_other_tokens():
    words = load_tokenizer({'kind': 'itos', 'itos': ['a', 'the', '\n', 'é']})
    assert words.encode('a\né') == [0, 2, 3] and words.decode([1, 3]) == 'theé' and words.token_bytes().tolist() == [1, 3, 1, 2]
    assert opening(words) == [2] and load_tokenizer(words.meta()).meta() == words.meta()
    with pytest.raises(ValueError, match=r"character 't' \(U\+0074\) at position 0"):
        words.encode('the')
    ids = load_tokenizer({'kind': 'ids', 'vocab_size': 70000})
    assert ids.vocab_size == 70000 and not ids.token_bytes().any() and opening(ids) == [0]
    for call in (ids.encode, ids.decode, ids.encode_array, ids.encode_batch):
        with pytest.raises(ValueError, match='the dataset names 70000 ids but no tokenizer'):
            call('a')
    for meta in ({'kind': 'itos', 'itos': 'ab'}, {'kind': 'itos', 'itos': ['a', 3]}, {'kind': 'itos', 'itos': ['a', 'a']}, {'kind': 'ids', 'vocab_size': 0}):
        with pytest.raises(ValueError):
            load_tokenizer(meta)


def test_opening_of_characters_without_a_line_break():
    assert opening(CharTokenizer('abc')) == [0] and opening(CharTokenizer('\nabc')) == [0] and opening(CharTokenizer('a\n')) == [1]
