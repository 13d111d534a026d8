"""corpus/train_tokenizer.py: the same tokenizer from the same text, and its commands."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, sentences

from corpus.train_tokenizer import sample_pieces, train_bpe

# the start of the Thousand Character Classic, of which every pair of neighbours comes in another verse too
CHINESE = '天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。寒来暑往，秋收冬藏。闰余成岁，律吕调阳。\n'


def corpus():
    return [sentences(3000, 1), CHINESE * 3 + '天地 玄黄 2024 年 1234567\n' * 2, '秋收冬藏' * 20]


@pytest.fixture(scope='module')
def bpe():
    pytest.importorskip('tokenizers')
    return train_bpe(corpus(), 400)


def test_training_looks_at_the_same_sample_whatever_the_order(bpe):
    assert train_bpe(corpus()[::-1], 400).meta() == bpe.meta()
    texts = [f'{i} ' * 5000 for i in range(30)]
    sample = sample_pieces(texts, 100_000)
    assert sample == sample_pieces(texts[::-1], 100_000) and 50_000 < sum(map(len, sample)) <= 100_000
    assert sample == sample_pieces(texts, 200_000)[:len(sample)]
    assert sorted(map(len, sample_pieces(['ab' * 20_000], 10 ** 6))) == [40_000 - 2 * (1 << 14), 1 << 14, 1 << 14]


def run_tokenizer(*args, **env):
    done = subprocess.run([sys.executable, '-m', 'corpus.train_tokenizer', *map(str, args)], cwd=ROOT, capture_output=True, text=True, encoding='utf-8',
                          env={**os.environ, **env}, timeout=600)
    return done.returncode, done.stdout, done.stderr


def test_train_and_compare_on_the_command_line(tmp_path):
    pytest.importorskip('tokenizers')
    (tmp_path / 'texts/more').mkdir(parents=True)
    (tmp_path / 'texts/a.txt').write_text('\ufeff' + corpus()[0], encoding='utf-8')
    (tmp_path / 'texts/more/b.txt').write_text(''.join(corpus()[1:]), encoding='utf-8')
    made = []
    for threads in '13':
        code, out, err = run_tokenizer('train', '--input', tmp_path / 'texts', '--vocab_size=380', '--out', tmp_path / threads,
                                       RAYON_NUM_THREADS=threads, TOKENIZERS_PARALLELISM='true')
        assert code == 0, err
        made.append({path.name: path.read_bytes() for path in (tmp_path / threads).iterdir()})
    assert made[0] == made[1] and sorted(made[0]) == ['merges.txt', 'tokenizer.json', 'tokenizer_config.json', 'vocab.json']
    assert len(json.loads(made[0]['vocab.json'])) == 380 and '380 tokens, of which 7 special' in out
    code, out, err = run_tokenizer('compare', '--input', tmp_path / 'texts/more/b.txt', '--tokenizers', 'byte', tmp_path / '1')
    assert code == 0, err
    _, _, byte, trained = [line.split() for line in out.splitlines()]
    assert byte[1:4] == ['263', f'{len("".join(corpus()[1:]).encode()):,}', '0.368'] and byte[4] == '1.000'
    assert trained[1] == '380' and float(trained[3]) > 2 * float(byte[3])


def test_what_cannot_be_trained_or_compared_is_one_line(tmp_path):
    pytest.importorskip('tokenizers')
    text, broken, empty, out = tmp_path / 'a.txt', tmp_path / 'b.txt', tmp_path / 'c.txt', tmp_path / 'out'
    text.write_text('天地 天地', encoding='utf-8')
    broken.write_bytes(b'good\nb\xe4d\n')
    empty.touch()
    for args, message in (
            (['train', '--input', empty, '--out', out], 'no pair of characters occurs twice in the text: give more text\n'),
            (['train', '--input', text, '--vocab_size=263', '--out', out], '--vocab_size=263: accepted are 264 or more, for the bytes and special tokens are 263\n'),
            (['train', '--input', text, broken, '--out', out], f'{broken}, line 2: not UTF-8 (invalid continuation byte): it is big5: '
             'convert it to UTF-8, or use --encoding=big5\n'),
            (['compare', '--input', text, '--tokenizers', 'gtp2'], 'tokenizer gtp2: accepted are gpt2, byte, and a folder with tokenizer.json: '
             'python -m corpus.train_tokenizer train --input TEXT --out FOLDER makes one\n')):
        assert run_tokenizer(*args)[::2] == (2, message)
    assert not out.exists()


def test_a_short_text_makes_fewer_tokens(tmp_path):
    pytest.importorskip('tokenizers')
    (tmp_path / 'a.txt').write_text('天地 天地', encoding='utf-8')
    assert run_tokenizer('train', '--input', tmp_path / 'a.txt', '--out', tmp_path / 'out')[:2] == (
        0, f'the text has too few pairs that occur twice for 16,384 tokens\n{tmp_path}/out: 268 tokens, of which 7 special\n')
