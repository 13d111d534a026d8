"""sample.py end to end on tiny checkpoints of random weights."""

import pytest
import torch

import checkpoint
import sample
from configurator import configure
from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig

CHARS = '\n abcdefgh€'


@pytest.fixture
def out_dir(tmp_path):
    """An out_dir whose model has 16 ids for 11 characters: the last five are padding, and the likeliest of all."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=16, n_layer=2, n_head=2, n_embd=16, arch='modern'))
    torch.nn.init.normal_(model.lm_head.weight)
    tokenizer = CharTokenizer(CHARS)
    state = dict(model=model.state_dict(), optimizer={}, model_args=vars(model.config), iter_num=7, config={}, tokenizer=tokenizer.meta(),
                 vocab_size=len(CHARS), format=checkpoint.FORMAT)
    checkpoint.save(tmp_path, state)
    return tmp_path


def run(monkeypatch, capsys, *flags):
    settings = dict(vars(sample))
    configure(settings, ['--device=cpu', '--dtype=float32', *flags])
    for name, value in settings.items():
        monkeypatch.setattr(sample, name, value, raising=False)
    capsys.readouterr()
    sample.main()
    return capsys.readouterr().out.split('char tokenizer\n')[1].split('\n---------------\n')[:-1]


def test_several_samples_same_seed_same_text(monkeypatch, capsys, out_dir):
    flags = f'--out_dir={out_dir}', '--start=ab', '--num_samples=3', '--max_new_tokens=30', '--seed=1'
    texts = run(monkeypatch, capsys, *flags)
    assert len(texts) == 3 and all(len(text) == 32 and text.startswith('ab') for text in texts) and len(set(texts)) == 3
    assert texts == run(monkeypatch, capsys, *flags)
    assert texts != run(monkeypatch, capsys, *flags, '--seed=2')


def test_padding_is_never_drawn_and_greedy_repeats(monkeypatch, capsys, out_dir):
    hot = run(monkeypatch, capsys, f'--out_dir={out_dir}', '--num_samples=20', '--temperature=9', '--top_k=None', '--max_new_tokens=40')
    assert set(''.join(hot)) <= set(CHARS)  # decoding an id of padding would have raised
    greedy = run(monkeypatch, capsys, f'--out_dir={out_dir}', '--start=a', '--num_samples=2', '--temperature=0', '--max_new_tokens=40')
    assert greedy[0] == greedy[1] and len(greedy[0]) == 41


def test_prompt_from_file_and_what_the_tokenizer_does_not_know(monkeypatch, capsys, out_dir, tmp_path):
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text('a €', encoding='utf-8')
    assert run(monkeypatch, capsys, f'--out_dir={out_dir}', f'--start=FILE:{prompt}', '--num_samples=1')[0].startswith('a €')
    with pytest.raises(ValueError, match=r"character 'z' \(U\+007A\) at position 1 is not among the 11 characters"):
        run(monkeypatch, capsys, f'--out_dir={out_dir}', '--start=az')


class Words:
    """A tokenizer of bytes, whose id 0 ends a document."""
    eot = 0

    def decode_bytes(self, ids):
        return bytes(ids)

    def decode(self, ids):
        return bytes(ids).decode()


def test_samples_stop_at_end_of_text_and_characters_arrive_whole(monkeypatch):
    monkeypatch.setattr(sample, 'num_samples', 2)
    first, second = '€uro'.encode() + b'\0xx', b'ab\0yyyyyy'[:9]
    drawn, seen = list(zip(first, second)), []
    def stream():
        for ids in drawn:
            seen.append(ids)
            yield torch.tensor(ids)
    pieces = list(sample.write_out(stream(), Words(), 'p:'))
    assert ''.join(pieces) == 'p:€uro\n---------------\np:ab\n---------------\n'
    assert '€' in pieces and len(seen) == 7, 'the euro sign in one piece; nothing drawn once both samples ended'


def test_best_is_taken_where_the_run_asked_for_it(monkeypatch, out_dir):
    monkeypatch.setattr(sample, 'out_dir', str(out_dir))
    state, path = sample.find_checkpoint()
    assert path.name == 'ckpt.pt'
    state['config'] = dict(always_save_checkpoint=False)
    checkpoint.save(out_dir, state, best=True)
    assert sample.find_checkpoint()[1].name == 'best.pt'


@pytest.mark.parametrize('flag, text', [
    ('--temperature=-1', '--temperature=-1.0: accepted is 0 (greedy) or more'),
    ('--top_p=0', '--top_p=0.0: accepted is above 0 up to 1, or None'),
    ('--num_samples=0', '--num_samples=0: accepted is 1 or more'),
    ('--out_dir=nowhere', 'nowhere has no checkpoint: train one with python train.py --out_dir=nowhere, or name another --out_dir'),
])
def test_errors(monkeypatch, capsys, flag, text):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run(monkeypatch, capsys, flag)
    assert str(error.value) == text
